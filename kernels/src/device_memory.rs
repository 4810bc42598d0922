//! What a device's memory holds, by kind, and how sizes are written for people.

use std::sync::Arc;

use crate::error::KernelError;

/// What an allocation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// The model: weights and tables made from its config.
    Weights,
    /// Keys and values.
    KvPool,
    /// Slabs of ordinary steps' activations.
    Activations,
    /// Slabs and inputs of recorded steps.
    RecordedSteps,
    /// Vision features that outlive a step.
    Features,
    /// What libraries and kernels work in, and buffers that every step uses.
    Scratch,
}

impl MemoryKind {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::Weights, Self::KvPool, Self::Activations, Self::RecordedSteps, Self::Features, Self::Scratch];

    /// A bounded label for metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::KvPool => "kv_pool",
            Self::Activations => "activations",
            Self::RecordedSteps => "recorded_steps",
            Self::Features => "features",
            Self::Scratch => "scratch",
        }
    }

    /// In a sentence.
    fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::KvPool => "the KV pool",
            Self::Activations => "a step's activations",
            Self::RecordedSteps => "a recorded step",
            Self::Features => "vision features",
            Self::Scratch => "scratch memory",
        }
    }
}

/// What a device's memory holds at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceMemory {
    /// Bytes by kind, in the order of [`MemoryKind::ALL`].
    pub held: [u64; 6],
    /// Bytes that nobody holds, of any process.
    pub free_bytes: u64,
    /// Bytes of the device.
    pub total_bytes: u64,
    /// Calls of the device's allocator so far: constant in a steady state.
    pub allocations: u64,
}

/// Reads a device's memory, from any thread.
pub type MemoryReader = Arc<dyn Fn() -> Result<DeviceMemory, KernelError> + Send + Sync>;

impl DeviceMemory {
    /// Bytes of one kind.
    pub fn of(&self, kind: MemoryKind) -> u64 {
        self.held[kind as usize]
    }

    /// Bytes beside weights and the KV pool.
    pub fn workspace_bytes(&self) -> u64 {
        self.held.iter().sum::<u64>() - self.of(MemoryKind::Weights) - self.of(MemoryKind::KvPool)
    }
}

/// An allocation that failed, and what there is: "asked for ... held ... free".
pub(crate) fn shortage(kind: MemoryKind, asked_bytes: u64, memory: &DeviceMemory) -> String {
    let (weights, kv) = (memory.of(MemoryKind::Weights), memory.of(MemoryKind::KvPool));
    format!(
        "out of device memory: {} more for {} do not fit; held are weights {} + KV pool {} + workspace {}, and of {} in \
         total {} are free",
        ByteSize(asked_bytes),
        kind.name(),
        ByteSize(weights),
        ByteSize(kv),
        ByteSize(memory.workspace_bytes()),
        ByteSize(memory.total_bytes),
        ByteSize(memory.free_bytes),
    )
}

/// A size for people: bytes, then KiB, MiB and GiB with two digits behind the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl std::fmt::Display for ByteSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (unit, name) = match self.0 {
            0..0x400 => return write!(f, "{} B", self.0),
            0x400..0x10_0000 => (0x400, "KiB"),
            0x10_0000..0x4000_0000 => (0x10_0000, "MiB"),
            _ => (0x4000_0000u64, "GiB"),
        };
        let hundredths = u128::from(self.0) * 100 / u128::from(unit);
        write!(f, "{}.{:02} {name}", hundredths / 100, hundredths % 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        let text = |bytes| ByteSize(bytes).to_string();
        assert_eq!(
            [0, 1023, 1024, 1 << 20, (1 << 30) - 1].map(text),
            ["0 B", "1023 B", "1.00 KiB", "1.00 MiB", "1023.99 MiB"]
        );
        assert_eq!(text(85_520_809_984), "79.64 GiB");
        assert_eq!(text(u64::MAX), "17179869183.99 GiB");
    }

    #[test]
    fn a_failed_allocation_says_what_there_is() {
        let held = [8_044_936_192, 64 << 30, 512 << 20, 256 << 20, 0, 34 << 20];
        let memory = DeviceMemory { held, free_bytes: 100 << 20, total_bytes: 85_520_809_984, allocations: 900 };
        assert_eq!(memory.workspace_bytes(), 802 << 20);
        assert_eq!(
            KernelError::OutOfMemory {
                kind: MemoryKind::RecordedSteps,
                asked_bytes: 192 << 20,
                memory: Box::new(memory)
            }
            .to_string(),
            "out of device memory: 192.00 MiB more for a recorded step do not fit; held are weights 7.49 GiB + KV pool \
             64.00 GiB + workspace 802.00 MiB, and of 79.64 GiB in total 100.00 MiB are free"
        );
        for (n, kind) in MemoryKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, n);
        }
    }
}
