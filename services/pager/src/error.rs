//! Why a page could not be stored or read.

use std::io;
use std::path::PathBuf;

/// The pager's errors.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// Neither tier has room. The caller answers `overloaded`; nothing was stored.
    #[error("a page of {page_bytes} bytes does not fit: {ram_free} bytes of RAM and {disk_free} of disk are free")]
    OverBudget {
        /// What was asked for.
        page_bytes: u64,
        /// Free bytes of the RAM budget.
        ram_free: u64,
        /// Free bytes of the disk budget.
        disk_free: u64,
    },
    /// No such page: never stored, released, or its lease ran out.
    #[error("page {0} is not held here")]
    Missing(u64),
    /// The page came back from disk with other bytes than were written.
    #[error("page {0} is corrupt on disk")]
    Corrupt(u64),
    /// Shape and length contradict each other: a bug of the caller.
    #[error("a page of shape {shape:?} has {expected} bytes, not {actual}")]
    Shape {
        /// Shape given.
        shape: Vec<u32>,
        /// Length that follows from it.
        expected: u64,
        /// Length given.
        actual: u64,
    },
    /// The spill folder failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl PagerError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Bounded metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::OverBudget { .. } => "over_budget",
            Self::Missing(_) => "missing",
            Self::Corrupt(_) => "corrupt",
            Self::Shape { .. } => "shape",
            Self::Io { .. } => "io",
        }
    }
}
