//! A language model: embedding, decoder stack, rotation and head, in the order that Qwen3 and its relatives share.

use millrace_kernels::Backend;

use super::decoder::RowAddition;
use super::{Decoder, DecoderLayer, LmHead, rope};
use crate::checkpoint::Loader;
use crate::error::ExecutorError;
use crate::layers::TextConfig;
use crate::step_batch::StepBatch;

/// The weights of a language model.
pub struct LanguageModel<B: Backend> {
    head: LmHead<B>,
    decoder: Decoder<B>,
    frequencies: B::Frequencies,
}

impl<B: Backend> LanguageModel<B> {
    /// Loads `{stack}.embed_tokens`, `{stack}.layers.N` through `layer`, `{stack}.norm` and `lm_head`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(
        loader: &mut Loader<'_, B>,
        stack: &str,
        config: &TextConfig,
        mut layer: impl FnMut(&mut Loader<'_, B>, usize) -> Result<DecoderLayer<B>, ExecutorError>,
    ) -> Result<Self, ExecutorError> {
        let (vocab, hidden) = (config.vocab, config.attention.hidden);
        let head = LmHead::load(loader, stack, vocab, hidden, config.eps, config.tied)?;
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            layers.push(layer(&mut loader.below(format!("{stack}.layers.{index}")), index)?);
        }
        let section = config.rope.mrope_section.as_deref();
        let inverse = rope::inverse_frequencies(config.rope.theta, config.attention.head_dim);
        let frequencies = loader.frequencies(&inverse, &rope::axes(inverse.len(), section), config.max_tokens)?;
        Ok(Self { head, decoder: Decoder::new(layers), frequencies })
    }

    /// Logits of the rows that `batch` asks for, `[rows, V]`.
    ///
    /// # Errors
    /// Shapes or indexes that do not fit.
    pub fn forward(
        &mut self,
        backend: &B,
        batch: &StepBatch<'_, B>,
        caches: &mut [B::KvCache],
    ) -> Result<B::Tensor, ExecutorError> {
        let mut x = self.head.embed(backend, &batch.staged.ids)?;
        let mut additions = Vec::new();
        if let Some(vision) = batch.vision {
            x = backend.scatter_rows(&x, &vision.rows, &vision.features.embeddings)?;
            for (layer, values) in vision.features.deepstack.iter().enumerate() {
                additions.push(RowAddition { layer, rows: vision.rows.clone(), values: values.clone() });
            }
        }
        let rope = backend.rope_table(&self.frequencies, &batch.staged.positions)?;
        let hidden = self.decoder.forward(backend, x, &rope, batch.staged, caches, &additions)?;
        self.head.logits(backend, &hidden)
    }
}
