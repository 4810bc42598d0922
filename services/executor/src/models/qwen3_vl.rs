//! Qwen3-VL: Qwen3 that sees images and clips. Source: transformers `Qwen3VLForConditionalGeneration` (models.md §4).
//!
//! Features of the tower replace the placeholders' embeddings; features of its inner blocks are added behind the first
//! decoder layers; positions have three axes.

use millrace_kernels::Backend;
use millrace_protocol::ready::MediaItem;

use super::qwen3::dense_layer;
use super::{Model, ModelSpec, PatchSpec};
use crate::checkpoint::{Fields, Loader};
use crate::error::ExecutorError;
use crate::layers::vision::{PatchGrid, VisionConfig, VisionFeatures, VisionTower};
use crate::layers::{LanguageModel, TextConfig, TextDefaults};
use crate::positions::Positions;
use crate::step_batch::StepBatch;

const DEFAULTS: TextDefaults = TextDefaults {
    vocab: 151_936,
    hidden: 4096,
    intermediate: 22_016,
    layers: 32,
    heads: 32,
    kv_heads: 32,
    head_dim: Some(128),
    max_tokens: 128_000,
    eps: 1e-6,
    theta: 500_000.0,
};

/// Of `rope_parameters`, where the file is silent.
const DEFAULT_MROPE_SECTION: [usize; 3] = [24, 20, 20];

/// The model.
pub struct Qwen3Vl<B: Backend> {
    spec: ModelSpec,
    config: TextConfig,
    tower: VisionTower<B>,
    language: LanguageModel<B>,
}

/// Loads it.
///
/// # Errors
/// Config or tensors that do not fit.
pub fn build<B: Backend + 'static>(
    fields: &Fields<'_>,
    loader: &mut Loader<'_, B>,
) -> Result<Box<dyn Model<B>>, ExecutorError> {
    let tied = fields.flag("tie_word_embeddings", false)?;
    let mut config = TextConfig::read(&fields.object("text_config")?, &DEFAULTS, tied)?;
    config.rope.mrope_section.get_or_insert_with(|| DEFAULT_MROPE_SECTION.to_vec());
    let vision_fields = fields.object("vision_config")?;
    let vision = VisionConfig::read(&vision_fields)?;
    if vision.output != config.attention.hidden {
        let what = format!("= {} is not the text's hidden_size {}", vision.output, config.attention.hidden);
        return Err(vision_fields.error("out_hidden_size", what));
    }
    if vision.deepstack.len() > config.layers {
        let what = format!("has more entries than the text has layers ({})", config.layers);
        return Err(vision_fields.error("deepstack_visual_indexes", what));
    }
    let VisionConfig { channels, temporal, patch, merge, .. } = vision;
    let spec = config.spec(Some(PatchSpec { channels, temporal, patch, merge }));
    let tower = VisionTower::load(&mut loader.below("model.visual"), vision)?;
    let language = LanguageModel::load(loader, "model.language_model", &config, |own, _| dense_layer(own, &config))?;
    Ok(Box::new(Qwen3Vl { spec, config, tower, language }))
}

impl<B: Backend> Model<B> for Qwen3Vl<B> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn kv_caches(&self, backend: &B, blocks: usize, block_tokens: usize) -> Result<Vec<B::KvCache>, ExecutorError> {
        self.config.kv_caches(backend, blocks, block_tokens)
    }

    fn positions(&self, media: &[MediaItem]) -> Positions {
        Positions::with_media(media, self.tower.config().merge as u32)
    }

    fn encode(&self, backend: &B, items: &[PatchGrid]) -> Result<Vec<VisionFeatures<B>>, ExecutorError> {
        self.tower.encode(backend, items)
    }

    fn forward(
        &mut self,
        backend: &B,
        batch: &StepBatch<'_, B>,
        caches: &mut [B::KvCache],
    ) -> Result<B::Tensor, ExecutorError> {
        self.language.forward(backend, batch, caches)
    }
}
