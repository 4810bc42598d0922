//! SIGTERM and Ctrl-C. Whoever may start a NATS server listens first: a signal that nobody hears ends the process at once and
//! leaves the server behind. Must not decide what a signal means.

use std::future::Future;
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit;

/// Hears every signal from the moment it was made.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Listens from now on, until the process ends.
    ///
    /// # Errors
    /// The system refuses.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next signal; returns at once if one has come since the last call.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs `command` to its end, or drops it at a signal, and with it what it started.
///
/// # Errors
/// The command's.
pub async fn unless_stopped(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let mut signals = StopSignals::listen()?;
    tokio::select! {
        code = command => code,
        () = signals.next() => Ok(ExitCode::from(exit::INTERRUPTED)),
    }
}
