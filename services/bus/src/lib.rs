//! NATS as this service uses it: connection, managed server, streams, jobs, fenced output, core messages, objects, $SRV.
//!
//! Owns every byte that is sent to or read from NATS and is the only crate that links async-nats. Must not know models,
//! policies or devices. Every call has its own timeout: the client blocks for ever when its queue fills while it is
//! disconnected, and its request multiplexer never forgets an unanswered request, so requests go through `inbox`.

mod api;
pub mod cancel;
mod connect;
mod consumers;
pub mod core;
pub mod errors;
pub mod events;
pub mod follow;
mod inbox;
pub mod jobs;
pub mod managed;
pub mod objects;
pub mod output;
mod pull;
mod server_config;
pub mod service;
pub mod status;
mod streams;
pub mod watch;

pub use connect::Bus;
pub use core::{Headers, Incoming, Subscription};
pub use errors::{AppendError, BusError, Kind};
pub use events::BusEvents;
pub use follow::Follow;
pub use jobs::{JobConsumer, JobDelivery, Published, published_unix_ms};
pub use managed::{ManagedOptions, ManagedServer};
pub use service::{ServiceHandle, ServiceInfo};
pub use status::{ConsumerStatus, StreamStatus};
pub use watch::Watch;
