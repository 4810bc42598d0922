//! What actix lacks: time as a value, credits, a drain gate, back-off, and supervision that restarts after a panic.
//!
//! Owns waiting and counting inside one process. Must not know NATS, models or devices.

pub mod backoff;
pub mod clock;
pub mod credits;
pub mod drain;
pub mod supervise;

pub use backoff::{Backoff, BackoffPolicy};
pub use clock::{Clock, ManualClock};
pub use credits::{Credit, Credits};
pub use drain::{DrainGate, InFlight};
pub use supervise::{Outcome, Restarts, supervise};
