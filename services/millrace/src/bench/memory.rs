//! What the device's memory holds, out of this process's metrics or its engine.

use millrace_executor::metrics::{DEVICE_ALLOCATIONS, DEVICE_FREE_BYTES, DEVICE_MEMORY_BYTES, DEVICE_TOTAL_BYTES};
use millrace_telemetry::Registry;
use serde::Serialize;

/// A device at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    weights: u64,
    kv: u64,
    workspace: u64,
    free: u64,
    total: u64,
    allocations: u64,
}

/// A device over one case, as the report has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryUse {
    /// The model.
    pub weights_bytes: u64,
    /// The KV pool.
    pub kv_bytes: u64,
    /// What the engine holds beside them.
    pub workspace_bytes: u64,
    /// Free, of any process.
    pub free_bytes: u64,
    /// Of the device.
    pub total_bytes: u64,
    /// Calls of the device's allocator before the case.
    pub allocations_before: u64,
    /// And behind it: equal in a steady state.
    pub allocations_after: u64,
}

impl Memory {
    /// Reads the registry; `None` if no executor of this process has a device with memory of its own.
    pub fn of(registry: &Registry) -> Option<Self> {
        let families = registry.gather();
        let family = |name: &str| families.iter().find(|family| family.name() == name);
        let held = family(DEVICE_MEMORY_BYTES)?;
        let mut memory = Self::default();
        for metric in held.get_metric() {
            let label = metric.get_label().iter().find(|label| label.name() == "kind").map(|label| label.value());
            let place = match label {
                Some("weights") => &mut memory.weights,
                Some("kv_pool") => &mut memory.kv,
                _ => &mut memory.workspace,
            };
            *place += whole(metric.get_gauge().get_value());
        }
        let gauge = |name: &str| family(name)?.get_metric().first().map(|metric| whole(metric.get_gauge().get_value()));
        memory.free = gauge(DEVICE_FREE_BYTES)?;
        memory.total = gauge(DEVICE_TOTAL_BYTES)?;
        let calls = family(DEVICE_ALLOCATIONS)?.get_metric();
        memory.allocations = calls.iter().map(|metric| whole(metric.get_counter().get_value())).sum();
        Some(memory)
    }

    /// From `self` to `after`.
    pub fn until(self, after: Self) -> MemoryUse {
        MemoryUse {
            weights_bytes: after.weights,
            kv_bytes: after.kv,
            workspace_bytes: after.workspace,
            free_bytes: after.free,
            total_bytes: after.total,
            allocations_before: self.allocations,
            allocations_after: after.allocations,
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Counts of bytes, below 2^53.
fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use millrace_executor::{DeviceMemory, ExecutorMetrics};

    use super::*;

    #[test]
    fn a_device_over_one_case() {
        let registry = Registry::new();
        let metrics = ExecutorMetrics::register(&registry).unwrap();
        assert_eq!(Memory::of(&registry), None);
        let calls = AtomicU64::new(9);
        metrics.show_memory(
            "tiny",
            Arc::new(move || {
                let allocations = calls.fetch_add(1, Ordering::Relaxed);
                Ok(DeviceMemory { held: [800, 600, 50, 20, 6, 3], free_bytes: 90, total_bytes: 1600, allocations })
            }),
        );
        let before = Memory::of(&registry).unwrap();
        let used = before.until(Memory::of(&registry).unwrap());
        assert_eq!(
            serde_json::to_value(used).unwrap(),
            serde_json::json!({
                "weights_bytes": 800, "kv_bytes": 600, "workspace_bytes": 79, "free_bytes": 90, "total_bytes": 1600,
                "allocations_before": 9, "allocations_after": 10,
            })
        );
    }
}
