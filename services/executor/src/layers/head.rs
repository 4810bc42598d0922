//! Token embedding and the head that turns hidden states into logits; they may share one table.

use millrace_kernels::Backend;

use super::RmsNorm;
use crate::checkpoint::Loader;
use crate::error::ExecutorError;

/// Embedding table, final norm and head.
pub struct LmHead<B: Backend> {
    embedding: B::Tensor,
    norm: RmsNorm<B>,
    head: B::Tensor,
}

impl<B: Backend> LmHead<B> {
    /// `{stack}.embed_tokens.weight [vocab, hidden]`, `{stack}.norm.weight`, and `lm_head.weight` at the root unless `tied`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(
        loader: &mut Loader<'_, B>,
        stack: &str,
        vocab: usize,
        hidden: usize,
        eps: f32,
        tied: bool,
    ) -> Result<Self, ExecutorError> {
        let embedding = loader.below(stack).tensor("embed_tokens.weight", &[vocab, hidden])?;
        let norm = RmsNorm::load(&mut loader.below(stack), "norm", hidden, eps)?;
        let head = if tied { embedding.clone() } else { loader.tensor("lm_head.weight", &[vocab, hidden])? };
        Ok(Self { embedding, norm, head })
    }

    /// `ids [T]` -> `[T, H]`.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn embed(&self, backend: &B, ids: &B::Indices) -> Result<B::Tensor, ExecutorError> {
        Ok(backend.embed(&self.embedding, ids)?)
    }

    /// Logits `[rows, V]` of `x [rows, H]`.
    ///
    /// # Errors
    /// Another row length.
    pub fn logits(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        let normed = self.norm.forward(backend, x)?;
        Ok(backend.linear(&normed, &self.head, None)?)
    }
}
