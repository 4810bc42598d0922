//! A device's memory as metrics: read from the device when somebody reads the metrics, not on a timer.

use std::sync::{Arc, Mutex, PoisonError};

use millrace_kernels::{MemoryKind, MemoryReader};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

use super::{DEVICE_ALLOCATIONS, DEVICE_FREE_BYTES, DEVICE_MEMORY_BYTES, DEVICE_TOTAL_BYTES};

/// The families and whose memory they show.
#[derive(Clone)]
pub struct DeviceMemoryMetrics {
    /// One reading at a time.
    readers: Arc<Mutex<Vec<(String, MemoryReader)>>>,
    held: IntGaugeVec,
    free: IntGaugeVec,
    total: IntGaugeVec,
    allocations: IntCounterVec,
}

impl std::fmt::Debug for DeviceMemoryMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceMemoryMetrics").finish_non_exhaustive()
    }
}

impl DeviceMemoryMetrics {
    pub(super) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        let own = Self {
            readers: Arc::default(),
            held: gauge(DEVICE_MEMORY_BYTES, "Device memory that a model holds, by kind", &["model", "kind"])?,
            free: gauge(DEVICE_FREE_BYTES, "Free memory of a model's device", &["model"])?,
            total: gauge(DEVICE_TOTAL_BYTES, "Memory of a model's device", &["model"])?,
            allocations: IntCounterVec::new(
                Opts::new(DEVICE_ALLOCATIONS, "Calls of the device's allocator: constant in a steady state"),
                &["model"],
            )?,
        };
        registry.register(Box::new(own.clone()))?;
        Ok(own)
    }

    pub(super) fn show(&self, model: &str, reader: MemoryReader) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.retain(|(known, _)| known != model);
        readers.push((model.to_owned(), reader));
    }

    fn read(&self) {
        let bytes = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        for (model, reader) in &*self.readers.lock().unwrap_or_else(PoisonError::into_inner) {
            // A device that fails says so in its next step; its last figures stay.
            let Ok(memory) = reader() else { continue };
            for kind in MemoryKind::ALL {
                self.held.with_label_values(&[model, kind.label()]).set(bytes(memory.of(kind)));
            }
            self.free.with_label_values(&[model]).set(bytes(memory.free_bytes));
            self.total.with_label_values(&[model]).set(bytes(memory.total_bytes));
            let allocations = self.allocations.with_label_values(&[model]);
            allocations.inc_by(memory.allocations.saturating_sub(allocations.get()));
        }
    }
}

impl Collector for DeviceMemoryMetrics {
    fn desc(&self) -> Vec<&Desc> {
        [self.held.desc(), self.free.desc(), self.total.desc(), self.allocations.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        [self.held.collect(), self.free.collect(), self.total.collect(), self.allocations.collect()].concat()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use millrace_kernels::{DeviceMemory, KernelError};

    use super::*;
    use crate::metrics::ExecutorMetrics;

    fn exposition(registry: &Registry) -> String {
        let shown = registry.gather().into_iter().filter(|family| family.name().contains("_device_"));
        prometheus::TextEncoder::new().encode_to_string(&shown.collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_exposition_is_read_from_the_device() {
        let registry = Registry::new();
        let metrics = ExecutorMetrics::register(&registry).unwrap();
        assert_eq!(exposition(&registry), "");
        let calls = Arc::new(AtomicU64::new(40));
        let own = calls.clone();
        let reader: MemoryReader = Arc::new(move || match own.fetch_add(1, Ordering::Relaxed) {
            42.. => Err(KernelError::NoDevice("gone".into())),
            allocations => Ok(DeviceMemory {
                held: [8000, 6000, 500, 200, 60, 30],
                free_bytes: 990,
                total_bytes: 16_000,
                allocations,
            }),
        });
        metrics.show_memory("tiny", reader);
        let text = "\
# HELP millrace_executor_device_allocations_total Calls of the device's allocator: constant in a steady state
# TYPE millrace_executor_device_allocations_total counter
millrace_executor_device_allocations_total{model=\"tiny\"} 40
# HELP millrace_executor_device_free_bytes Free memory of a model's device
# TYPE millrace_executor_device_free_bytes gauge
millrace_executor_device_free_bytes{model=\"tiny\"} 990
# HELP millrace_executor_device_memory_bytes Device memory that a model holds, by kind
# TYPE millrace_executor_device_memory_bytes gauge
millrace_executor_device_memory_bytes{kind=\"activations\",model=\"tiny\"} 500
millrace_executor_device_memory_bytes{kind=\"features\",model=\"tiny\"} 60
millrace_executor_device_memory_bytes{kind=\"kv_pool\",model=\"tiny\"} 6000
millrace_executor_device_memory_bytes{kind=\"recorded_steps\",model=\"tiny\"} 200
millrace_executor_device_memory_bytes{kind=\"scratch\",model=\"tiny\"} 30
millrace_executor_device_memory_bytes{kind=\"weights\",model=\"tiny\"} 8000
# HELP millrace_executor_device_total_bytes Memory of a model's device
# TYPE millrace_executor_device_total_bytes gauge
millrace_executor_device_total_bytes{model=\"tiny\"} 16000
";
        assert_eq!(exposition(&registry), text);
        assert_eq!(exposition(&registry), text.replace("} 40\n", "} 41\n"));
        assert_eq!(
            exposition(&registry),
            text.replace("} 40\n", "} 41\n"),
            "the last figures of a device that is gone"
        );
    }
}
