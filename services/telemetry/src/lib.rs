//! What operators see: log lines, the admin endpoint (/metrics /livez /healthz /readyz), and histogram buckets.
//!
//! Owns the form, never the families: every crate registers its own metrics on a registry it is handed. Holds no globals
//! except tracing's one subscriber.

pub mod admin;
pub mod buckets;
pub mod health;
pub mod logs;

pub use admin::AdminServer;
pub use health::Health;
pub use logs::{LogForm, init_logs};

/// The metrics registry that is passed around.
pub use prometheus::Registry;

/// Telemetry could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address} ([telemetry] listen): {source}")]
    Listen {
        /// Address asked for.
        address: std::net::SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The filter is not in tracing's syntax.
    #[error("[telemetry] log_filter `{filter}`: {message}")]
    Filter {
        /// The text given.
        filter: String,
        /// What is wrong with it.
        message: String,
    },
    /// Something in this process already writes logs.
    #[error("logs are already set up in this process")]
    LogsTwice,
}
