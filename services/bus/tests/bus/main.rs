//! The bus against a real nats-server: each test starts its own in its own folder.

mod core;
mod jobs;
mod objects;
mod output;
mod recovery;
mod server;
mod streams;
mod support;
