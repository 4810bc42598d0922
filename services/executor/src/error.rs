//! What can go wrong between a checkpoint on disk and a drawn token. Faults of one sequence are not here: they are
//! [`millrace_protocol::JobError`]s inside a step's output.

use std::path::PathBuf;

use millrace_kernels::KernelError;

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
    /// An op failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
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
            Self::Kernel(_) => 8,
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
    }
}
