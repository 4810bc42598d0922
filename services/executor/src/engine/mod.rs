//! The engine: slots, KV pool and the steps that run plans, two of which may be under way. Alone on its device; whoever owns it
//! decides on which thread. Must not know NATS, sessions or time.

mod assemble;
mod checks;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;
mod encode;
mod encoder_cache;
mod flight;
mod media;
mod options;
mod room;
mod slot;
mod step;
mod swap;
mod warm_up;

use std::sync::Arc;

use millrace_kernels::{MemoryReader, StepTimes};
use millrace_protocol::engine::EngineSpec;
use millrace_protocol::plan::StepPlan;
use millrace_protocol::step::StepOutput;

pub use encoder_cache::EncoderCounts;
pub use media::MediaSource;
pub use options::{DeviceKind, Dtype, ENCODER_DEVICE_BYTES, KvBudget, LoadOptions, load, load_on};
pub use step::Engine;

/// An engine whose model and device are hidden.
pub trait StepEngine: Send {
    /// Fixed properties.
    fn spec(&self) -> EngineSpec;

    /// Forgets all slots. Contents of the KV pool stay, unowned.
    fn reset(&mut self);

    /// Puts `plan`, which must be the one after the last, on the device and returns without waiting for it, unless its draws are the
    /// host's. At most [`STEPS_IN_FLIGHT`] are under way: one more waits for the first. After `broken` only [`Self::reset`] helps.
    fn launch(&mut self, plan: &StepPlan, media: &mut dyn MediaSource);

    /// Whether launching `plan` would wait for the steps under way: collecting them first gives their outputs sooner.
    fn must_wait(&self, plan: &StepPlan) -> bool;

    /// Whether the oldest step that was launched and not collected has ended.
    fn has_ended(&self) -> bool;

    /// Waits for that step; `None` if there is none.
    fn collect(&mut self) -> Option<Collected>;

    /// Runs `plan` by itself: nothing may be under way.
    fn step(&mut self, plan: &StepPlan, media: &mut dyn MediaSource) -> StepOutput;

    /// Why the device can run no further step: its state is unknown, and the process must end.
    fn fault(&self) -> Option<&str> {
        None
    }

    /// A reader of what the device's memory holds, for other threads; `None` on a device without memory of its own.
    fn memory_reader(&self) -> Option<MemoryReader> {
        None
    }

    /// Counters of the features found; `None` for a model that does not see.
    fn encoder_counts(&self) -> Option<Arc<EncoderCounts>> {
        None
    }

    /// Sets host memory aside for blocks that leave the pool. Returns how many it holds: 0 if blocks cannot be copied.
    fn keep_host_blocks(&mut self, _bytes: u64) -> u32 {
        0
    }

    /// Waits for copies that are under way: for measurements. A device that fails says so in its next step.
    fn wait(&self) {}

    /// Logits of every row of the last step, if [`LoadOptions::keep_logits`] is set.
    fn take_logits(&mut self) -> Vec<RowLogits>;
}

/// Steps that may be under way: while the device runs one, the next waits in its stream.
pub const STEPS_IN_FLIGHT: usize = 2;

/// A step that has ended.
#[derive(Debug)]
pub struct Collected {
    /// What it gave. `busy_us` and `idle_us` are 0: the caller fills them.
    pub output: StepOutput,
    /// By the device's clock; `None` if it has none, or the step did not run: the caller's clock counts then.
    pub times: Option<StepTimes>,
}

/// Logits behind one token.
#[derive(Debug, Clone, PartialEq)]
pub struct RowLogits {
    /// Slot of the sequence.
    pub slot: u32,
    /// Index of the token in the sequence.
    pub index: usize,
    /// One value for each row of the vocabulary.
    pub logits: Vec<f32>,
}

/// Why a plan cannot be run: it contradicts what the engine knows, or the device failed.
#[derive(Debug, PartialEq, Eq)]
struct Broken {
    why: String,
    device_failed: bool,
}

/// A contradiction.
fn broken(why: String) -> Broken {
    Broken { why, device_failed: false }
}

impl From<crate::error::ExecutorError> for Broken {
    fn from(error: crate::error::ExecutorError) -> Self {
        use millrace_kernels::KernelError as Kernel;
        let device_failed =
            matches!(error, crate::error::ExecutorError::Kernel(Kernel::Device { .. } | Kernel::OutOfMemory { .. }));
        Self { why: format!("{}: {error}", error.label()), device_failed }
    }
}

impl From<millrace_kernels::KernelError> for Broken {
    fn from(error: millrace_kernels::KernelError) -> Self {
        crate::error::ExecutorError::from(error).into()
    }
}
