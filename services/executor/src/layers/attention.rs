//! Causal grouped-query attention over paged keys and values, with per-head norms of q and k before the rotation (Qwen3).

use millrace_kernels::{Backend, RopeTable};

use super::{Linear, RmsNorm, Tail, TextDefaults};
use crate::checkpoint::{Fields, Loader};
use crate::error::ExecutorError;

/// Sizes of an attention block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Hidden size of the model.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Reads the sizes.
    ///
    /// # Errors
    /// Sizes that do not divide, biases, or a sliding window.
    pub fn read(fields: &Fields<'_>, defaults: &TextDefaults) -> Result<Self, ExecutorError> {
        fields.must_be_off("attention_bias")?;
        fields.must_be_off("qkv_bias")?;
        fields.must_be_off("use_sliding_window")?;
        let hidden = fields.size("hidden_size", defaults.hidden)?;
        let heads = fields.size("num_attention_heads", defaults.heads)?;
        // `null` stands for one key head a query head; an absent key for the class's default.
        let default_kv_heads = if fields.is_null("num_key_value_heads") { heads } else { defaults.kv_heads };
        let kv_heads = fields.size("num_key_value_heads", default_kv_heads)?;
        let head_dim = fields.size("head_dim", defaults.head_dim.unwrap_or(hidden / heads))?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(fields.error("num_key_value_heads", format!("= {kv_heads} does not divide {heads} heads")));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(fields.error("head_dim", format!("= {head_dim} is odd: it cannot be rotated in pairs")));
        }
        Ok(Self { hidden, heads, kv_heads, head_dim })
    }
}

/// One attention block.
pub struct Attention<B: Backend> {
    qkv: Linear<B>,
    output: Linear<B>,
    q_norm: RmsNorm<B>,
    k_norm: RmsNorm<B>,
    eps: f32,
    scale: f32,
}

impl<B: Backend> Attention<B> {
    /// `q_proj`, `k_proj`, `v_proj` (fused), `o_proj`, `q_norm`, `k_norm`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, shape: &AttentionShape, eps: f32) -> Result<Self, ExecutorError> {
        let AttentionShape { hidden, heads, kv_heads, head_dim } = *shape;
        let fused = [
            ("q_proj.weight", heads * head_dim),
            ("k_proj.weight", kv_heads * head_dim),
            ("v_proj.weight", kv_heads * head_dim),
        ];
        Ok(Self {
            qkv: Linear::load_stacked(loader, &fused, hidden)?,
            output: Linear::load(loader, "o_proj", hidden, heads * head_dim)?,
            q_norm: RmsNorm::load(loader, "q_norm", head_dim, eps)?,
            k_norm: RmsNorm::load(loader, "k_norm", head_dim, eps)?,
            eps,
            scale: (head_dim as f64).powf(-0.5) as f32,
        })
    }

    /// `x [T, H]` -> `[T, H]`, or with a `tail` its rows alone; keys and values of all the step's tokens go into `cache`.
    ///
    /// # Errors
    /// Shapes do not fit, or a block table is too short.
    pub fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        rope: &RopeTable<B::Tensor>,
        batch: &B::Batch,
        tail: Option<Tail<'_, B>>,
        cache: &mut B::KvCache,
    ) -> Result<B::Tensor, ExecutorError> {
        let qkv = self.qkv.forward(backend, x)?;
        let (q_norm, k_norm) = (self.q_norm.weight(), self.k_norm.weight());
        let mut q = backend.qkv_norm_rope_cache_write(&qkv, q_norm, k_norm, self.eps, rope, batch, cache)?;
        let mut queries = batch;
        if let Some(Tail { rows, batch }) = tail {
            (q, queries) = (backend.gather_rows(&q, rows)?, batch);
        }
        let attended = backend.paged_attention(&q, queries, cache, self.scale)?;
        self.output.forward(backend, &attended)
    }
}
