//! The bus against a real nats-server: each test starts its own in its own folder.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.

mod core;
mod dropped;
mod jobs;
mod objects;
mod output;
mod recovery;
mod server;
mod streams;
mod support;
