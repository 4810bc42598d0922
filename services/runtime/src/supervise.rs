//! Runs a future again after it failed or panicked. Must not know what the future does.

use std::any::Any;
use std::fmt::Display;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::FutureExt;

use crate::backoff::{Backoff, BackoffPolicy};
use crate::clock::Clock;
use crate::drain::DrainGate;

/// Counts restarts; clones share the count, so that metrics can read it while the supervisor runs.
#[derive(Debug, Clone, Default)]
pub struct Restarts(Arc<AtomicU64>);

impl Restarts {
    /// Restarts so far.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why supervision ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The future returned `Ok`.
    Finished,
    /// It failed while the process drains; the text says how.
    FailedWhileDraining(String),
}

/// Runs `factory()`'s future until it returns `Ok`, or until it fails while the gate is draining. Each error or panic is
/// logged, counted in `restarts`, and followed by a jittered wait that draining cuts short.
///
/// The future runs inside this one (no task is spawned), so dropping this drops it. A running future is never cut off by
/// draining: it watches the gate itself.
pub async fn supervise<F, Fut, E>(
    name: &str,
    policy: BackoffPolicy,
    clock: &Clock,
    gate: &DrainGate,
    restarts: &Restarts,
    mut factory: F,
) -> Outcome
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: Display,
{
    let mut backoff = Backoff::new(policy);
    loop {
        let started = clock.now();
        // The future is dropped after a panic and its state is never looked at again.
        let caught = AssertUnwindSafe(async { factory().await }).catch_unwind().await;
        let failure = match caught {
            Ok(Ok(())) => return Outcome::Finished,
            Ok(Err(error)) => error.to_string(),
            Err(payload) => format!("panicked: {}", panic_text(payload.as_ref())),
        };
        if gate.is_draining() {
            return Outcome::FailedWhileDraining(failure);
        }
        if clock.now().saturating_duration_since(started) >= policy.healthy_after {
            backoff.reset();
        }
        let delay = backoff.next_delay();
        let count = restarts.0.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::error!(task = name, %failure, restarts = count, delay_ms = delay.as_millis(), "restarting");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = gate.draining() => return Outcome::FailedWhileDraining(failure),
        }
    }
}

/// The text of a panic, as far as it has one.
pub fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&'static str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a text")
}

#[cfg(test)]
#[path = "supervise_tests.rs"]
mod tests;
