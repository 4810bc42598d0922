//! Qwen3 with experts. Source: transformers `Qwen3MoeForCausalLM` (models.md §2).

use millrace_kernels::Backend;

use super::Model;
use super::text::TextModel;
use crate::checkpoint::{Fields, Loader};
use crate::error::ExecutorError;
use crate::layers::moe::{ExpertShape, Moe, Router};
use crate::layers::{Attention, DecoderLayer, Ffn, LanguageModel, Mixer, SwiGlu, TextConfig, TextDefaults};

const DEFAULTS: TextDefaults = TextDefaults {
    vocab: 151_936,
    hidden: 2048,
    intermediate: 6144,
    layers: 24,
    heads: 32,
    kv_heads: 4,
    head_dim: None,
    max_tokens: 32_768,
    eps: 1e-6,
    theta: 10_000.0,
};

struct Experts {
    shape: ExpertShape,
    top_k: usize,
    norm_topk: bool,
    /// Every n-th layer has experts.
    step: usize,
    /// But these have none.
    dense: Vec<usize>,
}

impl Experts {
    fn read(fields: &Fields<'_>, hidden: usize) -> Result<Self, ExecutorError> {
        let count = fields.size("num_experts", fields.size("num_local_experts", 128)?)?;
        let intermediate = fields.size("moe_intermediate_size", 768)?;
        let top_k = fields.size("num_experts_per_tok", 8)?;
        if top_k > count {
            return Err(fields.error("num_experts_per_tok", format!("= {top_k} of {count} experts")));
        }
        if fields.optional_size("shared_expert_intermediate_size")?.unwrap_or(0) > 0 {
            return Err(ExecutorError::Unsupported("a shared expert in qwen3_moe".into()));
        }
        Ok(Self {
            shape: ExpertShape { count, hidden, intermediate },
            top_k,
            norm_topk: fields.flag("norm_topk_prob", false)?,
            step: fields.size("decoder_sparse_step", 1)?,
            dense: fields.sizes("mlp_only_layers", &[])?,
        })
    }

    fn sparse(&self, layer: usize) -> bool {
        !self.dense.contains(&layer) && (layer + 1).is_multiple_of(self.step)
    }
}

/// Loads it.
///
/// # Errors
/// Config or tensors that do not fit.
pub fn build<B: Backend + 'static>(
    fields: &Fields<'_>,
    loader: &mut Loader<'_, B>,
) -> Result<Box<dyn Model<B>>, ExecutorError> {
    let config = TextConfig::read(fields, &DEFAULTS, fields.flag("tie_word_embeddings", false)?)?;
    let experts = Experts::read(fields, config.attention.hidden)?;
    let language = LanguageModel::load(loader, "model", &config, |own, index| layer(own, &config, &experts, index))?;
    Ok(Box::new(TextModel::new(config, language)))
}

fn layer<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &TextConfig,
    experts: &Experts,
    index: usize,
) -> Result<DecoderLayer<B>, ExecutorError> {
    let hidden = config.attention.hidden;
    let attention = Attention::load(&mut loader.below("self_attn"), &config.attention, config.eps)?;
    let mut mlp = loader.below("mlp");
    let ffn = if experts.sparse(index) {
        let gate = mlp.tensor("gate.weight", &[experts.shape.count, hidden])?;
        let router = Router::Softmax { gate, top_k: experts.top_k, norm_topk: experts.norm_topk };
        Ffn::Moe(Moe::load(&mut mlp, &experts.shape, router, None)?)
    } else {
        Ffn::Dense(SwiGlu::load(&mut mlp, hidden, config.intermediate)?)
    };
    DecoderLayer::load(loader, hidden, config.eps, Mixer::Grouped(attention), ffn)
}
