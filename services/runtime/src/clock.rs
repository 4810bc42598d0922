//! Time as a value: the only place that reads the system's clocks. Must not sleep or schedule.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Tells the time. Cloning is cheap; all clones of one manual clock show the same time.
#[derive(Clone)]
pub struct Clock {
    source: Source,
}

#[derive(Clone)]
enum Source {
    System,
    Manual(Arc<Manual>),
}

struct Manual {
    origin: Instant,
    elapsed_nanos: AtomicU64,
    unix_ms: AtomicU64,
}

/// Moves the time of a clock made by [`Clock::manual`].
#[derive(Clone)]
pub struct ManualClock {
    inner: Arc<Manual>,
}

impl Clock {
    /// The machine's clocks.
    pub fn system() -> Self {
        Self { source: Source::System }
    }

    /// A clock that stands still until its handle moves it; wall time starts at `unix_ms`.
    pub fn manual(unix_ms: u64) -> (Self, ManualClock) {
        let inner = Arc::new(Manual {
            origin: system_instant(),
            elapsed_nanos: AtomicU64::new(0),
            unix_ms: AtomicU64::new(unix_ms),
        });
        (Self { source: Source::Manual(Arc::clone(&inner)) }, ManualClock { inner })
    }

    /// Monotonic time, for intervals.
    pub fn now(&self) -> Instant {
        match &self.source {
            Source::System => system_instant(),
            Source::Manual(m) => m.origin + Duration::from_nanos(m.elapsed_nanos.load(Ordering::SeqCst)),
        }
    }

    /// Wall time in milliseconds since 1970 (UTC), for deadlines that cross processes.
    pub fn unix_ms(&self) -> u64 {
        match &self.source {
            Source::System => system_unix_ms(),
            Source::Manual(m) => m.unix_ms.load(Ordering::SeqCst),
        }
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.source {
            Source::System => "Clock(system)",
            Source::Manual(_) => "Clock(manual)",
        })
    }
}

impl ManualClock {
    /// Moves both the monotonic and the wall time forward.
    pub fn advance(&self, by: Duration) {
        let nanos = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        self.inner.elapsed_nanos.fetch_add(nanos, Ordering::SeqCst);
        let millis = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.inner.unix_ms.fetch_add(millis, Ordering::SeqCst);
    }

    /// Sets the wall time alone, as a stepped system clock does.
    pub fn step_wall_clock(&self, unix_ms: u64) {
        self.inner.unix_ms.store(unix_ms, Ordering::SeqCst);
    }
}

#[allow(clippy::disallowed_methods)] // The one place where monotonic time enters.
fn system_instant() -> Instant {
    Instant::now()
}

#[allow(clippy::disallowed_methods)] // The one place where wall time enters.
fn system_unix_ms() -> u64 {
    // A clock before 1970 is a broken machine; 0 keeps every deadline in the future rather than failing jobs.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let (clock, hand) = Clock::manual(1_000);
        let start = clock.now();
        assert_eq!(clock.now(), start);
        hand.advance(Duration::from_millis(250));
        assert_eq!(clock.now() - start, Duration::from_millis(250));
        assert_eq!(clock.unix_ms(), 1_250);
    }

    #[test]
    fn a_wall_clock_step_leaves_intervals_alone() {
        let (clock, hand) = Clock::manual(10_000);
        let start = clock.now();
        hand.step_wall_clock(5);
        assert_eq!((clock.now(), clock.unix_ms()), (start, 5));
    }

    #[test]
    fn clones_share_time() {
        let (clock, hand) = Clock::manual(0);
        let other = clock.clone();
        hand.advance(Duration::from_secs(1));
        assert_eq!(clock.now(), other.now());
    }
}
