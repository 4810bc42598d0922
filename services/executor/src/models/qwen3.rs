//! Qwen3 (dense text). Source: transformers `Qwen3ForCausalLM` (models.md §1).

use millrace_kernels::Backend;

use super::Model;
use super::text::TextModel;
use crate::checkpoint::{Fields, Loader};
use crate::error::ExecutorError;
use crate::layers::{Attention, DecoderLayer, Ffn, LanguageModel, Mixer, SwiGlu, TextConfig, TextDefaults};

const DEFAULTS: TextDefaults = TextDefaults {
    vocab: 151_936,
    hidden: 4096,
    intermediate: 22_016,
    layers: 32,
    heads: 32,
    kv_heads: 32,
    head_dim: Some(128),
    max_tokens: 32_768,
    eps: 1e-6,
    theta: 10_000.0,
};

/// Loads it.
///
/// # Errors
/// Config or tensors that do not fit.
pub fn build<B: Backend + 'static>(
    fields: &Fields<'_>,
    loader: &mut Loader<'_, B>,
) -> Result<Box<dyn Model<B>>, ExecutorError> {
    let config = TextConfig::read(fields, &DEFAULTS, fields.flag("tie_word_embeddings", false)?)?;
    let language = LanguageModel::load(loader, "model", &config, |own, _| dense_layer(own, &config))?;
    Ok(Box::new(TextModel::new(config, language)))
}

/// A layer with Qwen3's attention and a dense feed-forward: `self_attn` and `mlp`.
///
/// # Errors
/// A tensor is missing or misshapen.
pub fn dense_layer<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &TextConfig,
) -> Result<DecoderLayer<B>, ExecutorError> {
    let hidden = config.attention.hidden;
    let attention = Attention::load(&mut loader.below("self_attn"), &config.attention, config.eps)?;
    let ffn = SwiGlu::load(&mut loader.below("mlp"), hidden, config.intermediate)?;
    DecoderLayer::load(loader, hidden, config.eps, Mixer::Grouped(attention), Ffn::Dense(ffn))
}
