//! Why a model folder cannot be used for preprocessing. Faults of jobs are [`millrace_protocol::JobError`]s instead.

use std::path::PathBuf;

/// Errors at loading time.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what its name promises.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint asks for something this service does not do.
    #[error("{}: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is.
        reason: String,
    },
}

impl LoadError {
    /// Every label, for documents and metrics.
    pub const LABELS: &[&'static str] = &["read", "content", "unsupported_file"];

    /// A bounded label: one of [`Self::LABELS`].
    pub fn label(&self) -> &'static str {
        let place = match self {
            Self::Read { .. } => 0,
            Self::Content { .. } => 1,
            Self::Unsupported { .. } => 2,
        };
        Self::LABELS[place]
    }

    pub(crate) fn content(path: impl Into<PathBuf>, reason: impl std::fmt::Display) -> Self {
        Self::Content { path: path.into(), reason: reason.to_string() }
    }

    pub(crate) fn unsupported(path: impl Into<PathBuf>, reason: impl std::fmt::Display) -> Self {
        Self::Unsupported { path: path.into(), reason: reason.to_string() }
    }
}
