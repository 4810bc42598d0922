//! Sizes that every language model of this kind has in its config.

use millrace_kernels::Backend;

use super::{AttentionShape, KvLayout};
use crate::checkpoint::{Fields, RopeConfig};
use crate::error::ExecutorError;
use crate::models::{ModelSpec, PatchSpec};

/// Defaults of a Hugging Face config class, for keys that the file leaves out.
#[derive(Debug, Clone, Copy)]
pub struct TextDefaults {
    /// `vocab_size`.
    pub vocab: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// `num_hidden_layers`.
    pub layers: usize,
    /// `num_attention_heads`.
    pub heads: usize,
    /// `num_key_value_heads`.
    pub kv_heads: usize,
    /// `head_dim`; `None` is hidden size / heads.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`.
    pub max_tokens: usize,
    /// `rms_norm_eps`.
    pub eps: f64,
    /// `rope_theta`.
    pub theta: f64,
}

/// Sizes of a language model.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Rows of the vocabulary.
    pub vocab: usize,
    /// Size inside a dense feed-forward.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Attention sizes. Of `head_dim` elements every one is rotated.
    pub attention: AttentionShape,
    /// What is cached.
    pub kv: KvLayout,
    /// Of every RMSNorm.
    pub eps: f32,
    /// Longest sequence.
    pub max_tokens: usize,
    /// Rotation.
    pub rope: RopeConfig,
    /// Whether the head is the embedding table.
    pub tied: bool,
}

impl TextConfig {
    /// Reads `fields`; `tied` is decided by the caller, since in nested configs the outer key counts.
    ///
    /// # Errors
    /// A value of the wrong kind, or a part that is not supported.
    pub fn read(fields: &Fields<'_>, defaults: &TextDefaults, tied: bool) -> Result<Self, ExecutorError> {
        fields.only_text("hidden_act", "silu")?;
        let attention = AttentionShape::read(fields, defaults)?;
        let AttentionShape { kv_heads, head_dim, .. } = attention;
        Ok(Self {
            vocab: fields.size("vocab_size", defaults.vocab)?,
            intermediate: fields.size("intermediate_size", defaults.intermediate)?,
            layers: fields.size("num_hidden_layers", defaults.layers)?,
            attention,
            kv: KvLayout::Heads { kv_heads, head_dim },
            eps: fields.number("rms_norm_eps", defaults.eps)? as f32,
            max_tokens: fields.size("max_position_embeddings", defaults.max_tokens)?,
            rope: RopeConfig::read(fields, "default", defaults.theta)?,
            tied,
        })
    }
}

impl TextConfig {
    /// What an engine needs to know of a model with these sizes.
    pub fn spec(&self, vision: Option<PatchSpec>) -> ModelSpec {
        let kv_elements = self.layers * self.kv.elements();
        let single_rows_differ = matches!(self.kv, KvLayout::Latent { .. });
        ModelSpec { vocab: self.vocab, max_tokens: self.max_tokens, kv_elements, single_rows_differ, vision }
    }

    /// One pool of keys and values for each layer.
    ///
    /// # Errors
    /// The device has no room for them.
    pub fn kv_caches<B: Backend>(
        &self,
        backend: &B,
        blocks: usize,
        block_tokens: usize,
    ) -> Result<Vec<B::KvCache>, ExecutorError> {
        (0..self.layers).map(|_| self.kv.pool(backend, blocks, block_tokens)).collect()
    }
}
