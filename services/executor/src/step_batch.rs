//! One step's ragged batch as a model takes it. Built by the engine; must not know slots or plans.

use millrace_kernels::{Backend, Ragged};

use crate::layers::vision::VisionFeatures;

/// Tokens of several sequences, one behind the other.
pub struct StepBatch<B: Backend> {
    /// Token ids `[T]`.
    pub ids: Vec<u32>,
    /// Rotary positions `[T]` on the axes (temporal, height, width).
    pub positions: Vec<[u32; 3]>,
    /// Extents of the sequences and their block tables.
    pub ragged: Ragged,
    /// Rows of the batch that stand for vision features, and those features.
    pub vision: Option<VisionRows<B>>,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<u32>,
}

/// Features and where they go.
pub struct VisionRows<B: Backend> {
    /// Rows of the batch.
    pub rows: Vec<u32>,
    /// One feature row for each.
    pub features: VisionFeatures<B>,
}
