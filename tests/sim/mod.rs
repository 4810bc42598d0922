//! Simulator of the whole pipeline on virtual time: the real scheduler policy, an executor that only takes the time a cost
//! model says, and NATS as latencies and counted messages. Seeded: one number repeats a run exactly.
//!
//! `scenario` names what is simulated, `world` is the event loop, `engine` one scheduler with its executor, `ledger` the
//! executor's own books against which every plan is checked, `report` what comes out.

pub mod cost;
mod engine;
mod faults;
pub mod histogram;
mod jobs;
mod ledger;
pub mod report;
mod router;
pub mod scenario;
pub mod traffic;
pub mod workload;
pub mod world;

pub use report::Report;
pub use scenario::{Scenario, Setup};
pub use world::{Violation, run};
