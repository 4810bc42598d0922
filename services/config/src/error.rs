//! What can be wrong with a configuration. Every invalid value is reported, not only the first.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Not TOML, or a key or type that the schema does not know.
    #[error("{}{message}", location(path.as_deref()))]
    Parse {
        /// The file, if it was one.
        path: Option<PathBuf>,
        /// Line, column and what was expected.
        message: String,
    },
    /// Values outside their ranges, or that contradict each other.
    #[error("{}{}", location(path.as_deref()), list(problems))]
    Invalid {
        /// The file, if it was one.
        path: Option<PathBuf>,
        /// All of them, in the order of the file's tables.
        problems: Vec<Invalid>,
    },
}

/// One invalid value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("[{table}] {key}: {message}")]
pub struct Invalid {
    /// TOML table, such as `scheduler`.
    pub table: String,
    /// Key in the table.
    pub key: String,
    /// What it must be and what was found.
    pub message: String,
}

impl ConfigError {
    /// Adds the file's name.
    pub(crate) fn in_file(self, file: &Path) -> Self {
        match self {
            Self::Parse { message, .. } => Self::Parse { path: Some(file.to_path_buf()), message },
            Self::Invalid { problems, .. } => Self::Invalid { path: Some(file.to_path_buf()), problems },
            read @ Self::Read { .. } => read,
        }
    }
}

fn location(path: Option<&Path>) -> String {
    path.map(|path| format!("{}: ", path.display())).unwrap_or_default()
}

fn list(problems: &[Invalid]) -> String {
    let mut text = String::new();
    for problem in problems {
        let _ = write!(text, "\n  {problem}");
    }
    text
}
