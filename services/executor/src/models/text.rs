//! What all models that take text alone have in common: everything but their layers.

use millrace_kernels::Backend;

use super::{Model, ModelSpec};
use crate::error::ExecutorError;
use crate::layers::{LanguageModel, TextConfig};
use crate::step_batch::StepBatch;

/// A model of text.
pub struct TextModel<B: Backend> {
    spec: ModelSpec,
    config: TextConfig,
    language: LanguageModel<B>,
}

impl<B: Backend> TextModel<B> {
    /// A model of `config`'s sizes.
    pub fn new(config: TextConfig, language: LanguageModel<B>) -> Self {
        Self { spec: config.spec(None), config, language }
    }
}

impl<B: Backend> Model<B> for TextModel<B> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn kv_caches(&self, backend: &B, blocks: usize, block_tokens: usize) -> Result<Vec<B::KvCache>, ExecutorError> {
        self.config.kv_caches(backend, blocks, block_tokens)
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
