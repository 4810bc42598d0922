//! `millrace asyncapi`: prints the generated document.

use std::io::Write;
use std::process::ExitCode;

/// Prints it.
///
/// # Errors
/// Standard output refused it.
pub fn run() -> anyhow::Result<ExitCode> {
    std::io::stdout().lock().write_all(crate::asyncapi::document_text()?.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
