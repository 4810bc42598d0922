//! The drain gate: a one-way flag that says "take nothing new", and a count of work that is still in flight.
//! Must not stop work itself; who holds a guard decides when it is done.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

/// Shared by everything in a process that takes work. Clones are the same gate.
#[derive(Debug, Clone)]
pub struct DrainGate {
    state: Arc<watch::Sender<State>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    draining: bool,
    in_flight: usize,
}

/// One piece of work in flight. Dropping it says that the work ended.
#[derive(Debug)]
#[must_use = "dropping the guard says that the work ended"]
pub struct InFlight {
    state: Arc<watch::Sender<State>>,
}

impl DrainGate {
    /// An open gate.
    pub fn new() -> Self {
        Self { state: Arc::new(watch::Sender::new(State::default())) }
    }

    /// Starts draining. There is no way back; further calls change nothing.
    pub fn start_draining(&self) {
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.draining, true));
    }

    /// Whether draining has started.
    pub fn is_draining(&self) -> bool {
        self.state.borrow().draining
    }

    /// Waits until draining starts; returns at once if it has.
    pub async fn draining(&self) {
        self.wait_for(|state| state.draining).await;
    }

    /// Counts a piece of new work; `None` once draining has started.
    pub fn enter(&self) -> Option<InFlight> {
        let mut entered = false;
        self.state.send_if_modified(|state| {
            entered = !state.draining;
            state.in_flight += usize::from(entered);
            entered
        });
        entered.then(|| InFlight { state: Arc::clone(&self.state) })
    }

    /// Pieces of work in flight.
    pub fn in_flight(&self) -> usize {
        self.state.borrow().in_flight
    }

    /// Waits until nothing is in flight; `false` if `timeout` passes first. Does not start draining.
    pub async fn wait_idle(&self, timeout: Duration) -> bool {
        tokio::time::timeout(timeout, self.wait_for(|state| state.in_flight == 0)).await.is_ok()
    }

    async fn wait_for(&self, reached: impl FnMut(&State) -> bool) {
        let mut watcher = self.state.subscribe();
        // `self` keeps the sender alive, so the channel cannot close while this waits.
        let _ = watcher.wait_for(reached).await;
    }
}

impl Default for DrainGate {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.state.send_modify(|state| state.in_flight -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn nothing_enters_once_draining() {
        let gate = DrainGate::new();
        let guard = gate.enter().expect("open");
        assert!(gate.draining().now_or_never().is_none());
        gate.clone().start_draining();
        assert!(gate.is_draining() && gate.enter().is_none());
        gate.draining().await;
        assert_eq!(gate.in_flight(), 1);
        drop(guard);
        assert_eq!(gate.in_flight(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_idle_ends_with_the_last_guard_or_the_timeout() {
        let gate = DrainGate::new();
        let guards: Vec<_> = (0..3).map(|_| gate.enter().expect("open")).collect();
        assert!(!gate.wait_idle(Duration::from_secs(5)).await);
        let waiter = tokio::spawn({
            let gate = gate.clone();
            async move { gate.wait_idle(Duration::from_secs(60)).await }
        });
        drop(guards);
        assert!(waiter.await.unwrap());
    }
}
