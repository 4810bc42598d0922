//! What can go wrong in an op: all of it is found before or instead of the computation, never a wrong result.

/// Failure of one op.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Arguments do not fit together.
    #[error("{op}: {what}")]
    Shape {
        /// Name of the op.
        op: &'static str,
        /// What does not fit, with the sizes seen.
        what: String,
    },
    /// An element type the op does not take.
    #[error("{op}: dtype {dtype} is not supported")]
    Dtype {
        /// Name of the op.
        op: &'static str,
        /// The dtype seen.
        dtype: String,
    },
    /// An index outside its table.
    #[error("{op}: index {index} is outside 0..{limit}")]
    Index {
        /// Name of the op.
        op: &'static str,
        /// The index.
        index: u64,
        /// First index that is too large.
        limit: u64,
    },
    /// The tensor library failed.
    #[error("tensor library: {0}")]
    Candle(#[from] candle_core::Error),
}
