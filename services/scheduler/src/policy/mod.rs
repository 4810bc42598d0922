//! Scheduling policy: which sequence computes which tokens in which step, with which blocks. Pure and synchronous; time
//! is an argument. Must not do I/O, spawn, lock or read a clock.

pub mod accounts;
mod admission;
mod arena;
pub mod blocks;
mod deadlines;
pub mod outputs;
pub mod planner;
pub mod prefix;
pub mod queue;
pub mod sequence;
pub mod shares;
mod sharing;
mod step;
pub mod swap;
mod wire;

pub use accounts::Counts;
pub use blocks::Imbalance;
pub use outputs::Contradiction;
pub use planner::{Blame, Event, Events, Limits, Plan, Planner};
pub use sequence::{NewSequence, SeqId, Sequence};

#[cfg(test)]
#[path = "planner_tests.rs"]
mod planner_tests;
#[cfg(test)]
#[path = "property_tests.rs"]
mod property_tests;
#[cfg(test)]
mod scripted;
#[cfg(test)]
#[path = "sharing_tests.rs"]
mod sharing_tests;
