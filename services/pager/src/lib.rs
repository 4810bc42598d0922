//! Tensor pages: bytes that belong to a job, kept in RAM up to a budget and on disk beyond it, checked by
//! BLAKE3 whenever they come back from disk, and freed when the job's lease is released or runs out.
//!
//! Owns budgets, spilling, checksums, leases. Must not know pixels, NATS or a runtime: every call is
//! synchronous and may touch the disk, so asynchronous callers run it where blocking is allowed.

mod error;
mod ledger;
mod spill;
mod store;
#[cfg(test)]
mod tests;

pub use error::PagerError;
pub use ledger::PagerCounters;
pub use store::{PageStore, PagerLimits};
