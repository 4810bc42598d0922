//! What a run asks of NATS: latencies of a hop, messages counted by kind, and how that compares with what one server was
//! measured to carry. Message counts follow the actors' code; a message is one publish that the server takes.

use std::time::Duration;

use fastrand::Rng;
use serde::Serialize;

/// Rates measured on 2 cores with nats-server 2.15.1 on loopback (the brief's messaging.md).
pub mod measured {
    /// Core messages of 64 bytes, per second.
    pub const CORE_PER_SEC: f64 = 1_360_000.0;
    /// Appends to the output log under the fence, 64 jobs at once, file storage, per second.
    pub const FENCED_PER_SEC: f64 = 59_000.0;
    /// The same with fsync of every message, per second.
    pub const FENCED_SYNC_PER_SEC: f64 = 5_300.0;
}

/// Latencies.
#[derive(Debug, Clone, Copy)]
pub struct Network;

impl Network {
    /// One core message: 117 us in the middle, with a tail of queueing.
    pub fn hop(rng: &mut Rng) -> Duration {
        Duration::from_nanos((80_000.0 - 53_000.0 * (1.0 - rng.f64()).ln()) as u64)
    }

    /// One append to a stream and its acknowledgement: 162 us in the middle.
    pub fn append(rng: &mut Rng) -> Duration {
        Duration::from_nanos((120_000.0 - 60_000.0 * (1.0 - rng.f64()).ln()) as u64)
    }

    /// Preprocessing of a text job.
    pub fn preprocess(prompt_tokens: u32) -> Duration {
        Duration::from_nanos(500_000 + u64::from(prompt_tokens) * 400)
    }
}

/// Messages by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Messages {
    /// Jobs published (stored).
    pub jobs: u64,
    /// Deliveries, offers, their answers, tombstone and output reads, acknowledgements, page leases.
    pub job_control: u64,
    /// Claims and finals (stored under the fence).
    pub claims_and_finals: u64,
    /// Deltas (stored under the fence).
    pub deltas: u64,
    /// Plans and outputs.
    pub steps: u64,
    /// Beacons.
    pub beacons: u64,
}

impl Messages {
    /// Core messages of a job's way besides those counted elsewhere: pull and delivery 2, output log read 2, tombstone
    /// read by both actors 4, final double ack 2, page lease 1; each stored message's acknowledgement is counted with it.
    pub const CONTROL_OF_JOB: u64 = 11;

    /// Those that a stream stores.
    pub fn stored(&self) -> u64 {
        self.jobs + self.claims_and_finals + self.deltas
    }

    /// All that the server carries, acknowledgements of stored ones included.
    pub fn all(&self) -> u64 {
        2 * self.stored() + self.job_control + self.steps + self.beacons
    }
}
