//! What a layer caches for each token.

use millrace_kernels::Backend;

use crate::error::ExecutorError;

/// Elements of one token in one layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvLayout {
    /// A key and a value for each key head.
    Heads {
        /// Key heads.
        kv_heads: usize,
        /// Elements of a key, and of a value.
        head_dim: usize,
    },
    /// One latent and one rotated key part, shared by all heads.
    Latent {
        /// Elements of the latent.
        latent: usize,
        /// Elements of the rotated part.
        rotated: usize,
    },
}

impl KvLayout {
    /// Elements of one token.
    pub fn elements(self) -> usize {
        match self {
            Self::Heads { kv_heads, head_dim } => 2 * kv_heads * head_dim,
            Self::Latent { latent, rotated } => latent + rotated,
        }
    }

    /// An empty pool for one layer.
    ///
    /// # Errors
    /// The device has no room for it.
    pub fn pool<B: Backend>(
        self,
        backend: &B,
        blocks: usize,
        block_tokens: usize,
    ) -> Result<B::KvCache, ExecutorError> {
        match self {
            Self::Heads { kv_heads, head_dim } => Ok(backend.kv_cache(blocks, block_tokens, kv_heads, head_dim)?),
            Self::Latent { latent, rotated } => Ok(backend.mla_cache(blocks, block_tokens, latent, rotated)?),
        }
    }
}
