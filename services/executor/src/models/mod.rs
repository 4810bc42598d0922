//! The models: each is one file against `layers/` and one line of the registry.

pub mod glm4_moe_lite;
pub mod qwen3;
pub mod qwen3_moe;
pub mod qwen3_vl;
mod text;

use millrace_kernels::Backend;
use millrace_protocol::ready::MediaItem;

use crate::checkpoint::{Checkpoint, Fields, Loader};
use crate::error::ExecutorError;
use crate::layers::DraftLayer;
use crate::layers::vision::{PatchGrid, VisionFeatures};
use crate::positions::Positions;
use crate::step_batch::StepBatch;

/// What an engine needs to know about a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSpec {
    /// Rows of the vocabulary.
    pub vocab: usize,
    /// Longest sequence, in tokens.
    pub max_tokens: usize,
    /// Elements that one token takes in the caches of all layers.
    pub kv_elements: usize,
    /// Whether a row that is alone in its sequence's step takes another form of attention than rows together do (latent
    /// attention). The engine then sees to it that which form a token takes does not depend on how a step is cut.
    pub single_rows_differ: bool,
    /// Geometry of patches, for models that see.
    pub vision: Option<PatchSpec>,
}

/// Geometry of a model's patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchSpec {
    /// Colour channels.
    pub channels: usize,
    /// Frames of a patch.
    pub temporal: usize,
    /// Pixels along a side.
    pub patch: usize,
    /// Patches along a side of what one placeholder token stands for.
    pub merge: usize,
}

/// A model on a device.
pub trait Model<B: Backend>: Send {
    /// Sizes.
    fn spec(&self) -> &ModelSpec;

    /// Empty caches, one for each layer.
    ///
    /// # Errors
    /// The device has no room for them.
    fn kv_caches(&self, backend: &B, blocks: usize, block_tokens: usize) -> Result<Vec<B::KvCache>, ExecutorError>;

    /// Rotary positions of a prompt. `media` was checked against [`ModelSpec::vision`].
    fn positions(&self, _media: &[MediaItem]) -> Positions {
        Positions::text()
    }

    /// Vision features of each item.
    ///
    /// # Errors
    /// The model does not see, or shapes do not fit.
    fn encode(&self, _backend: &B, _items: &[PatchGrid]) -> Result<Vec<VisionFeatures<B>>, ExecutorError> {
        Err(ExecutorError::Unsupported("media for a model that takes text alone".into()))
    }

    /// Logits `[rows, V]` of the rows that `batch` asks for; its tokens' keys and values go into `caches`.
    ///
    /// # Errors
    /// Shapes or indexes that do not fit.
    fn forward(
        &mut self,
        backend: &B,
        batch: &StepBatch<'_, B>,
        caches: &mut [B::KvCache],
    ) -> Result<B::Tensor, ExecutorError>;
}

/// Loads one architecture.
type Build<B> = fn(&Fields<'_>, &mut Loader<'_, B>) -> Result<Box<dyn Model<B>>, ExecutorError>;

/// The registry: `architectures[0]` and its model file.
fn registry<B: Backend + 'static>() -> Vec<(&'static str, Build<B>)> {
    vec![
        ("Qwen3VLForConditionalGeneration", qwen3_vl::build),
        ("Qwen3ForCausalLM", qwen3::build),
        ("Qwen3MoeForCausalLM", qwen3_moe::build),
        ("Glm4MoeLiteForCausalLM", glm4_moe_lite::build),
    ]
}

/// Builds the model that `architecture` names from its config and tensors.
///
/// # Errors
/// An architecture that is not in the registry, a config or tensors that do not fit it.
pub fn build<B: Backend + 'static>(
    architecture: &str,
    fields: &Fields<'_>,
    loader: &mut Loader<'_, B>,
) -> Result<Box<dyn Model<B>>, ExecutorError> {
    let entries = registry::<B>();
    let Some((_, build)) = entries.iter().find(|(known, _)| *known == architecture) else {
        let known: Vec<&str> = entries.iter().map(|(known, _)| *known).collect();
        return Err(ExecutorError::Unsupported(format!("architecture `{architecture}` (known: {})", known.join(", "))));
    };
    build(fields, loader)
}

/// Loads the model of `checkpoint`; every tensor must find its place.
///
/// # Errors
/// As [`build`], and tensors left over.
pub fn load<B: Backend + 'static>(mut checkpoint: Checkpoint, backend: &B) -> Result<Box<dyn Model<B>>, ExecutorError> {
    let name = checkpoint.architecture().to_string();
    let (fields, weights) = checkpoint.parts()?;
    let model = build(&name, &fields, &mut Loader::new(weights, backend))?;
    checkpoint.finish()?;
    Ok(model)
}

/// Loads the layer of `checkpoint` that drafts tokens ahead, by itself: the model leaves it out. `None` if there is none.
///
/// # Errors
/// Config or tensors that do not fit.
pub fn load_draft<B: Backend + 'static>(
    mut checkpoint: Checkpoint,
    backend: &B,
) -> Result<Option<DraftLayer<B>>, ExecutorError> {
    if checkpoint.architecture() != "Glm4MoeLiteForCausalLM" {
        return Ok(None);
    }
    let (fields, weights) = checkpoint.parts()?;
    glm4_moe_lite::draft(&fields, &mut Loader::new(weights, backend))
}
