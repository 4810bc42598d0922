//! The executor: models, layers, weights, sampling and the engine that runs planned steps on a device.
//!
//! [`load`] opens a model directory and gives a [`StepEngine`], which turns one [`millrace_protocol::plan::StepPlan`] into
//! one [`millrace_protocol::step::StepOutput`] at a time, synchronously. Must not touch JOBS or OUT: it answers plans only.

pub mod actor;
pub mod checkpoint;
pub mod device;
pub mod engine;
pub mod error;
pub mod generate;
pub mod layers;
pub mod measure;
pub mod metrics;
pub mod models;
pub mod pages;
pub mod positions;
pub mod random_weights;
pub mod sampling;
pub mod session;
pub mod step_batch;

pub use actor::{ExecutorActor, ExecutorParts};
pub use engine::{
    Collected, DeviceKind, Dtype, ENCODER_DEVICE_BYTES, KvBudget, LoadOptions, MediaSource, RowLogits, StepEngine, load,
};
pub use error::{ErrorKind, ExecutorError};
pub use metrics::ExecutorMetrics;
pub use millrace_kernels::{DeviceMemory, MemoryReader};
