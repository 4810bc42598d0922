//! Everything that can go wrong here, for this crate's callers.

use std::path::PathBuf;

use millrace_bus::BusError;

/// Errors of the scheduler.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// The checkpoint's tokenizer cannot be used.
    #[error("cannot read the tokenizer {}: {message}", path.display())]
    Tokenizer {
        /// File tried.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Tokens that do not decode.
    #[error("cannot decode the answer: {0}")]
    Decode(String),
    /// What was shown cannot be continued.
    #[error("the text shown so far is not that of the tokens shown so far")]
    Continuity,
    /// The configuration contradicts itself.
    #[error("[scheduler] {0}")]
    Config(String),
    /// A metric family could not be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// NATS.
    #[error(transparent)]
    Bus(#[from] BusError),
}

impl SchedulerError {
    /// Bounded metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Tokenizer { .. } => "tokenizer",
            Self::Decode(_) => "decode",
            Self::Continuity => "continuity",
            Self::Config(_) => "config",
            Self::Metrics(_) => "metrics",
            Self::Bus(_) => "bus",
        }
    }
}
