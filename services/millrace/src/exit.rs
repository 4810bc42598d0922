//! Exit codes (sysexits.h) and the two faults that have one of their own. Owns no text of other faults.

use std::process::ExitCode;

/// All jobs ended well, or the command did what it says.
pub const OK: u8 = 0;
/// Some jobs failed, or a fault without a code of its own.
pub const FAILED: u8 = 1;
/// `EX_USAGE`: the command line, pipeline.toml or a model folder must be changed.
pub const USAGE: u8 = 64;
/// `EX_UNAVAILABLE`: no NATS server, or no service behind it.
pub const UNAVAILABLE: u8 = 69;
/// Ended by Ctrl-C (128 + SIGINT).
pub const INTERRUPTED: u8 = 130;
/// Whoever read standard output has gone (128 + SIGPIPE).
pub const PIPE: u8 = 141;

/// A fault that decides the exit code. The text names the key or flag to change.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The command line or a file it names is wrong: exit code 64.
    #[error("{0}")]
    Usage(String),
    /// Nothing answers: exit code 69.
    #[error("{0}")]
    Unavailable(String),
}

/// The exit code of an error: that of the first [`Fault`] in its chain, else 1.
pub fn code_of(error: &anyhow::Error) -> ExitCode {
    let fault = error.chain().find_map(|cause| cause.downcast_ref::<Fault>());
    ExitCode::from(match fault {
        Some(Fault::Usage(_)) => USAGE,
        Some(Fault::Unavailable(_)) => UNAVAILABLE,
        None => FAILED,
    })
}

/// Whether the reader of standard output has gone, as with `| head`: nothing to tell anybody.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<std::io::Error>() {
        Some(io) => io.kind() == std::io::ErrorKind::BrokenPipe,
        // serde_json hides the writer's error inside its own.
        None => {
            cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind)
                == Some(std::io::ErrorKind::BrokenPipe)
        }
    };
    error.chain().any(broken)
}

/// A usage fault as an [`anyhow::Error`].
pub fn usage(text: impl Into<String>) -> anyhow::Error {
    Fault::Usage(text.into()).into()
}

/// An unavailable service as an [`anyhow::Error`].
pub fn unavailable(text: impl Into<String>) -> anyhow::Error {
    Fault::Unavailable(text.into()).into()
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_reader_that_went_is_known_through_json_too() {
        struct Gone;
        impl std::io::Write for Gone {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        assert!(is_broken_pipe(&serde_json::to_writer(Gone, &1).unwrap_err().into()));
        assert!(is_broken_pipe(&std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()));
        assert!(!is_broken_pipe(&anyhow::anyhow!("other")));
    }

    #[test]
    fn a_fault_keeps_its_code_under_context() {
        let wrapped = Err::<(), _>(unavailable("no server")).context("while captioning").unwrap_err();
        assert_eq!(code_of(&wrapped), ExitCode::from(UNAVAILABLE));
        assert_eq!(code_of(&usage("bad flag")), ExitCode::from(USAGE));
        assert_eq!(code_of(&anyhow::anyhow!("other")), ExitCode::from(FAILED));
        assert_eq!(format!("{wrapped:#}"), "while captioning: no server");
    }
}
