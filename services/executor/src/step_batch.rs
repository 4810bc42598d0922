//! One step's ragged batch as a model takes it. Built by the engine; must not know slots or plans.

use millrace_kernels::{Backend, Staged};

use crate::layers::vision::VisionFeatures;

/// Tokens of several sequences, one behind the other.
pub struct StepBatch<'a, B: Backend> {
    /// Ids, positions, extents and block tables, on the device.
    pub staged: &'a Staged<B>,
    /// Rows of the batch that stand for vision features, and those features.
    pub vision: Option<&'a VisionRows<B>>,
}

/// Features and where they go.
pub struct VisionRows<B: Backend> {
    /// Rows of the batch.
    pub rows: B::Indices,
    /// One feature row for each.
    pub features: VisionFeatures<B>,
}
