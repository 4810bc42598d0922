//! Counts of what the connection lived through, for metrics. Must not act on any of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Shared counters of one connection; cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct BusEvents {
    inner: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    connected: AtomicBool,
    closing: AtomicBool,
    connects: AtomicU64,
    disconnects: AtomicU64,
    slow_consumers: AtomicU64,
    lame_duck: AtomicU64,
    server_errors: AtomicU64,
    dropped: AtomicU64,
    timeouts: AtomicU64,
    orphans: AtomicU64,
}

impl BusEvents {
    /// Whether the connection stands now.
    pub fn is_connected(&self) -> bool {
        self.inner.connected.load(Ordering::Relaxed)
    }

    /// Connections made after the first one.
    pub fn reconnects(&self) -> u64 {
        self.inner.connects.load(Ordering::Relaxed).saturating_sub(1)
    }

    /// Connections lost.
    pub fn disconnects(&self) -> u64 {
        self.inner.disconnects.load(Ordering::Relaxed)
    }

    /// Times the client library dropped messages because a buffer was full.
    pub fn slow_consumers(&self) -> u64 {
        self.inner.slow_consumers.load(Ordering::Relaxed)
    }

    /// Times a server announced that it goes away.
    pub fn lame_duck(&self) -> u64 {
        self.inner.lame_duck.load(Ordering::Relaxed)
    }

    /// Errors the server or the client library reported outside any call.
    pub fn server_errors(&self) -> u64 {
        self.inner.server_errors.load(Ordering::Relaxed)
    }

    /// Messages dropped because a [`crate::Subscription`] was at its capacity.
    pub fn dropped(&self) -> u64 {
        self.inner.dropped.load(Ordering::Relaxed)
    }

    /// Calls that ran into their timeout.
    pub fn timeouts(&self) -> u64 {
        self.inner.timeouts.load(Ordering::Relaxed)
    }

    /// Jobs that arrived after their pull had been given up, and were returned to the queue.
    pub fn orphans(&self) -> u64 {
        self.inner.orphans.load(Ordering::Relaxed)
    }

    /// The connection is being closed on purpose: its end is no fault.
    pub(crate) fn closing(&self) {
        self.inner.closing.store(true, Ordering::Relaxed);
    }

    pub(crate) fn observe(&self, event: &async_nats::Event) {
        use async_nats::Event;
        let counters = &self.inner;
        match event {
            Event::Connected => {
                counters.connected.store(true, Ordering::Relaxed);
                counters.connects.fetch_add(1, Ordering::Relaxed);
            }
            Event::Disconnected => {
                counters.connected.store(false, Ordering::Relaxed);
                if counters.closing.load(Ordering::Relaxed) {
                    tracing::debug!("connection to NATS closed");
                } else {
                    counters.disconnects.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!("connection to NATS lost");
                }
            }
            Event::SlowConsumer(subscription) => {
                counters.slow_consumers.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(subscription, "NATS client dropped messages");
            }
            Event::LameDuckMode => {
                counters.lame_duck.fetch_add(1, Ordering::Relaxed);
                tracing::warn!("NATS server announced that it goes away");
            }
            Event::Draining => {}
            Event::Closed => counters.connected.store(false, Ordering::Relaxed),
            Event::ServerError(error) => {
                counters.server_errors.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "NATS server error");
            }
            Event::ClientError(error) => {
                counters.server_errors.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%error, "NATS client error");
            }
        }
    }

    pub(crate) fn count_dropped(&self) {
        self.inner.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_timeout(&self) {
        self.inner.timeouts.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_orphan(&self) {
        self.inner.orphans.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_closed_on_purpose_is_not_lost() {
        let events = BusEvents::default();
        events.observe(&async_nats::Event::Connected);
        events.observe(&async_nats::Event::Disconnected);
        assert_eq!((events.is_connected(), events.disconnects()), (false, 1));
        events.observe(&async_nats::Event::Connected);
        events.closing();
        events.observe(&async_nats::Event::Disconnected);
        assert_eq!((events.is_connected(), events.disconnects(), events.reconnects()), (false, 1, 1));
    }
}
