//! Log lines on standard error, as text or JSON. Standard output belongs to the CLI.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::TelemetryError;

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogForm {
    /// For people; coloured on a terminal.
    Text,
    /// One JSON object a line, fields at the top.
    Json,
}

/// Starts logging for the whole process; call once, first in `main`.
///
/// # Errors
/// A filter that does not parse, or a second call.
pub fn init_logs(form: LogForm, filter: &str) -> Result<(), TelemetryError> {
    let parsed = EnvFilter::builder()
        .parse(filter)
        .map_err(|e| TelemetryError::Filter { filter: filter.to_string(), message: e.to_string() })?;
    let builder = tracing_subscriber::fmt().with_env_filter(parsed).with_writer(std::io::stderr);
    let started = match form {
        LogForm::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogForm::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|_| TelemetryError::LogsTwice)
}
