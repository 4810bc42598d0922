//! What can go wrong in an op: all of it is found before or instead of the computation, never a wrong result.

use crate::device_memory::{DeviceMemory, MemoryKind};

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
    /// No device of the kind asked for can be used here: driver, library, device or its age.
    #[error("no CUDA device: {0}")]
    NoDevice(String),
    /// The device has no room.
    #[error("{}", crate::device_memory::shortage(*kind, *asked_bytes, memory))]
    OutOfMemory {
        /// What the allocation that failed was for.
        kind: MemoryKind,
        /// Its bytes; 0 if the driver does not say.
        asked_bytes: u64,
        /// What the device held then.
        memory: Box<DeviceMemory>,
    },
    /// A call of the driver or of a device library failed; the device's state is unknown from here on.
    #[error("{op}: the device failed: {what}")]
    Device {
        /// Name of the op or call.
        op: &'static str,
        /// What the driver says.
        what: String,
    },
    /// The op, or the op with these arguments, does not exist on this device.
    #[error("{op} is not supported on this device yet: {what}")]
    Unsupported {
        /// Name of the op.
        op: &'static str,
        /// What is missing.
        what: String,
    },
    /// The tensor library failed.
    #[error("tensor library: {0}")]
    Candle(#[from] candle_core::Error),
}
