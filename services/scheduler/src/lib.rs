//! Scheduler: takes preprocessed jobs, plans steps for one executor at a time, and writes what they give to the output
//! log. `policy` decides (pure), `emit` turns tokens into text, `session` holds the executor, `log` writes, `actor` joins
//! them over NATS. Must not link candle or kernels, and never reads media.

pub mod actor;
pub mod emit;
pub mod error;
mod heartbeat;
mod log;
pub mod metrics;
pub mod policy;
mod session;
pub mod settings;

pub use actor::{Observe, SchedulerActor, SchedulerParts, Snapshot, StopNow};
pub use error::SchedulerError;
pub use metrics::SchedulerMetrics;
pub use settings::Settings;
