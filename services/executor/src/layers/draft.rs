//! The layer that drafts the next token but one (MTP, multi-token prediction). Loaded on demand; nothing runs it yet.
//!
//! `u = join([embed_norm(embedding of the newest token), hidden_norm(hidden state behind the final norm)])`, the decoder layer over
//! `u` with pages of its own, `head_norm`, the model's head (models.md §3.4; source: transformers `MtpLayer`).

use millrace_kernels::Backend;

use super::{DecoderLayer, Linear, RmsNorm};
use crate::checkpoint::Loader;
use crate::error::ExecutorError;

/// Weights beside the model's own; the tables of tokens are shared with it.
pub struct DraftLayer<B: Backend> {
    /// Of the newest token's embedding.
    pub embed_norm: RmsNorm<B>,
    /// Of the model's hidden state.
    pub hidden_norm: RmsNorm<B>,
    /// `[H, 2H]`, the embedding's half first.
    pub join: Linear<B>,
    /// A complete decoder layer.
    pub decoder: DecoderLayer<B>,
    /// Before the head.
    pub head_norm: RmsNorm<B>,
}

impl<B: Backend> DraftLayer<B> {
    /// `enorm`, `hnorm`, `eh_proj`, `shared_head.norm` and the decoder layer at hand.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(
        loader: &mut Loader<'_, B>,
        hidden: usize,
        eps: f32,
        decoder: DecoderLayer<B>,
    ) -> Result<Self, ExecutorError> {
        Ok(Self {
            embed_norm: RmsNorm::load(loader, "enorm", hidden, eps)?,
            hidden_norm: RmsNorm::load(loader, "hnorm", hidden, eps)?,
            join: Linear::load(loader, "eh_proj", hidden, 2 * hidden)?,
            decoder,
            head_norm: RmsNorm::load(loader, "shared_head.norm", hidden, eps)?,
        })
    }
}
