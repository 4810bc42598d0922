//! What can go wrong between a checkpoint on disk and a drawn token. Faults of one sequence are not here: they are
//! [`millrace_protocol::JobError`]s inside a step's output.

use std::path::PathBuf;

use millrace_kernels::{ByteSize, KernelError};

/// Failure of loading or running a model.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// A file of the model directory cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the model directory is not what its name says.
    #[error("{path}: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A key of config.json is missing or holds something else than expected.
    #[error("config.json: `{key}` {what}")]
    Config {
        /// Path of the key, such as `text_config.head_dim`.
        key: String,
        /// What is wrong and what is expected.
        what: String,
    },
    /// The checkpoint asks for something this executor does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The model needs a tensor that the checkpoint lacks.
    #[error("tensor `{0}` is missing from the checkpoint")]
    MissingTensor(String),
    /// A tensor has another shape than the config says.
    #[error("tensor `{name}` has shape {found:?}, the config asks for {expected:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape from the config.
        expected: Vec<usize>,
    },
    /// Tensors that no part of the model took: a sign that the model is not what its config says.
    #[error("{count} tensors of the checkpoint were not used, first {names:?}")]
    UnusedTensors {
        /// How many.
        count: usize,
        /// The first few, in order.
        names: Vec<String>,
    },
    /// Options that do not fit together or do not fit the model.
    #[error("engine option `{option}`: {what}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// The device has no room for model, KV pool and workspace together.
    #[error("{0}")]
    DeviceMemory(Box<MemoryShortage>),
    /// An op failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// What was asked of a device's memory, and what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryShortage {
    /// The model.
    pub weights_bytes: u64,
    /// The KV pool that is asked for; 0: as large as there is room.
    pub kv_bytes: u64,
    /// Activations, recorded steps, libraries.
    pub workspace_bytes: u64,
    /// Free before this model was loaded.
    pub free_bytes: u64,
    /// Of the device.
    pub total_bytes: u64,
}

impl std::fmt::Display for MemoryShortage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { weights_bytes, kv_bytes, workspace_bytes, free_bytes, total_bytes } = *self;
        let beside = weights_bytes.saturating_add(workspace_bytes);
        let asked = beside.saturating_add(kv_bytes);
        let [weights, kv, workspace, sum, free, total] =
            [weights_bytes, kv_bytes, workspace_bytes, asked, free_bytes, total_bytes].map(ByteSize);
        write!(
            f,
            "out of device memory: weights {weights} + KV pool {kv} + workspace {workspace} = {sum} are asked for, and of \
             {total} in total {free} are free; "
        )?;
        match free_bytes.checked_sub(beside) {
            Some(left) if left > 0 && kv_bytes > left => {
                write!(f, "set `[executor] kv_bytes` to \"auto\" or to at most \"{}MiB\"", left >> 20)
            }
            _ => f.write_str("serve a smaller model, lower `[executor] step_tokens`, or free the device's memory"),
        }
    }
}

/// What the owner of an engine does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Another attempt may succeed.
    Retry,
    /// Wrong input: the same attempt fails again.
    Reject,
    /// A fault of this program or its device: exit.
    Fatal,
}

impl ExecutorError {
    /// What to do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Retry,
            Self::DeviceMemory(_) => ErrorKind::Reject,
            Self::Kernel(_) => ErrorKind::Fatal,
            _ => ErrorKind::Reject,
        }
    }

    /// Every label, for documents and metrics.
    pub const LABELS: &[&'static str] = &[
        "io",
        "malformed",
        "config",
        "unsupported",
        "missing_tensor",
        "tensor_shape",
        "unused_tensors",
        "option",
        "device_memory",
        "kernel",
    ];

    /// A bounded label for metrics: one of [`Self::LABELS`].
    pub fn label(&self) -> &'static str {
        let place = match self {
            Self::Io { .. } => 0,
            Self::Malformed { .. } => 1,
            Self::Config { .. } => 2,
            Self::Unsupported(_) => 3,
            Self::MissingTensor(_) => 4,
            Self::TensorShape { .. } => 5,
            Self::UnusedTensors { .. } => 6,
            Self::Option { .. } => 7,
            Self::DeviceMemory(_) | Self::Kernel(KernelError::OutOfMemory { .. }) => 8,
            Self::Kernel(_) => 9,
        };
        Self::LABELS[place]
    }

    /// A tensor-library error outside an op.
    pub(crate) fn candle(error: candle_core::Error) -> Self {
        Self::Kernel(KernelError::Candle(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_those_of_their_variants() {
        let one = ExecutorError::UnusedTensors { count: 1, names: Vec::new() };
        assert_eq!(
            (one.label(), ExecutorError::candle(candle_core::Error::msg("x")).label()),
            ("unused_tensors", "kernel")
        );
        assert_eq!(ExecutorError::MissingTensor("x".into()).label(), "missing_tensor");
        assert_eq!(ExecutorError::Unsupported("x".into()).label(), "unsupported");
        let memory = Box::default();
        let kind = millrace_kernels::MemoryKind::RecordedSteps;
        let late = ExecutorError::Kernel(KernelError::OutOfMemory { kind, asked_bytes: 1, memory });
        assert_eq!((late.label(), late.kind()), ("device_memory", ErrorKind::Fatal));
    }

    #[test]
    fn a_shortage_is_a_sum_and_names_the_key() {
        let shortage = |weights_bytes: u64, kv_bytes: u64, free_bytes: u64| {
            let (workspace_bytes, total_bytes) = (1536 << 20, 80 << 30);
            let own = MemoryShortage { weights_bytes, kv_bytes, workspace_bytes, free_bytes, total_bytes };
            let error = ExecutorError::DeviceMemory(Box::new(own));
            assert_eq!((error.label(), error.kind()), ("device_memory", ErrorKind::Reject));
            error.to_string()
        };
        assert_eq!(
            shortage(8 << 30, 100 << 30, 79 << 30),
            "out of device memory: weights 8.00 GiB + KV pool 100.00 GiB + workspace 1.50 GiB = 109.50 GiB are asked for, \
             and of 80.00 GiB in total 79.00 GiB are free; set `[executor] kv_bytes` to \"auto\" or to at most \"71168MiB\""
        );
        let smaller = "serve a smaller model, lower `[executor] step_tokens`, or free the device's memory";
        assert_eq!(
            shortage(100 << 30, 0, 79 << 30),
            format!(
                "out of device memory: weights 100.00 GiB + KV pool 0 B + workspace 1.50 GiB = 101.50 GiB are asked for, and \
                 of 80.00 GiB in total 79.00 GiB are free; {smaller}"
            )
        );
        assert!(shortage(78 << 30, 1 << 30, 79 << 30).ends_with(smaller));
        assert!(shortage(u64::MAX, u64::MAX, 1 << 30).ends_with(smaller));
    }
}
