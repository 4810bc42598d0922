//! The executor's metric families. Names and buckets stand here and nowhere else.

use std::sync::Arc;

use millrace_kernels::MemoryReader;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::engine::EncoderCounts;

mod device_memory;
mod encoder;

pub use device_memory::DeviceMemoryMetrics;
pub use encoder::EncoderMetrics;

/// Family of [`ExecutorMetrics::busy_seconds`], for readers of a registry.
pub const STEP_BUSY_SECONDS: &str = "millrace_executor_step_busy_seconds";
/// Family of [`ExecutorMetrics::idle_seconds`].
pub const STEP_IDLE_SECONDS: &str = "millrace_executor_step_idle_seconds";

/// Families of a device's memory, for readers of a registry.
pub const DEVICE_MEMORY_BYTES: &str = "millrace_executor_device_memory_bytes";
/// Free bytes of a device.
pub const DEVICE_FREE_BYTES: &str = "millrace_executor_device_free_bytes";
/// All bytes of a device.
pub const DEVICE_TOTAL_BYTES: &str = "millrace_executor_device_total_bytes";
/// Calls of a device's allocator.
pub const DEVICE_ALLOCATIONS: &str = "millrace_executor_device_allocations_total";

/// Lookups of vision features.
pub const ENCODER_LOOKUPS: &str = "millrace_executor_encoder_lookups_total";

/// Metrics of a process's executors, handed to their actors as a value.
#[derive(Debug, Clone)]
pub struct ExecutorMetrics {
    /// Steps computed.
    pub steps: IntCounter,
    /// Time the device was busy with one step.
    pub busy_seconds: Histogram,
    /// Time the device had nothing to do between two steps of a session, by its own clock if it has one.
    pub idle_seconds: Histogram,
    /// Tokens run in one step.
    pub step_tokens: Histogram,
    /// Tokens drawn.
    pub drawn_tokens: IntCounter,
    /// Sequences that hold a slot, by model.
    pub open_slots: IntGaugeVec,
    /// Sessions that ended because a plan was lost or contradicted the state.
    pub broken_sessions: IntCounter,
    /// Sequences that failed alone, by error code.
    pub failed_sequences: IntCounterVec,
    /// Bytes of tensor pages read, by where they were (`local`, `remote`).
    pub page_bytes: IntCounterVec,
    /// Time one page read took.
    pub page_seconds: Histogram,
    /// Memory of the models' devices, read when the metrics are.
    pub device_memory: DeviceMemoryMetrics,
    /// Vision features found and not found.
    pub encoder: EncoderMetrics,
}

impl ExecutorMetrics {
    /// Shows the memory of `model`'s device from now on.
    pub fn show_memory(&self, model: &str, reader: MemoryReader) {
        self.device_memory.show(model, reader);
    }

    /// Shows what became of `model`'s lookups of vision features from now on.
    pub fn show_encoder(&self, model: &str, counts: Arc<EncoderCounts>) {
        self.encoder.show(model, counts);
    }
}

impl ExecutorMetrics {
    /// Creates and registers the families.
    ///
    /// # Errors
    /// If a family is registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let times = prometheus::exponential_buckets(0.000_1, 2.0, 18)?;
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| -> prometheus::Result<Histogram> {
            let made = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let counter = |name: &str, help: &str| -> prometheus::Result<IntCounter> {
            let made = IntCounter::new(name, help)?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let counters = |name: &str, help: &str, label: &str| -> prometheus::Result<IntCounterVec> {
            let made = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(made.clone()))?;
            Ok(made)
        };
        let open_slots = Opts::new("millrace_executor_open_slots", "Sequences that hold a slot, by model");
        let open_slots = IntGaugeVec::new(open_slots, &["model"])?;
        registry.register(Box::new(open_slots.clone()))?;
        Ok(Self {
            steps: counter("millrace_executor_steps_total", "Steps computed")?,
            busy_seconds: histogram(STEP_BUSY_SECONDS, "Time the device was busy with one step", times.clone())?,
            idle_seconds: histogram(
                STEP_IDLE_SECONDS,
                "Time the device waited for the next plan between two steps",
                times.clone(),
            )?,
            step_tokens: histogram(
                "millrace_executor_step_tokens",
                "Tokens run in one step",
                prometheus::exponential_buckets(1.0, 2.0, 15)?,
            )?,
            drawn_tokens: counter("millrace_executor_drawn_tokens_total", "Tokens drawn")?,
            open_slots,
            broken_sessions: counter(
                "millrace_executor_broken_sessions_total",
                "Sessions ended by a lost or contradictory plan",
            )?,
            failed_sequences: counters(
                "millrace_executor_failed_sequences_total",
                "Sequences that failed alone, by error code",
                "code",
            )?,
            page_bytes: counters(
                "millrace_executor_page_bytes_total",
                "Bytes of tensor pages read, by place",
                "place",
            )?,
            page_seconds: histogram("millrace_executor_page_read_seconds", "Time one page read took", times)?,
            device_memory: DeviceMemoryMetrics::register(registry)?,
            encoder: EncoderMetrics::register(registry)?,
        })
    }
}
