//! The scheduler actor over a real NATS server, with executors and preprocess actors that speak the protocol.

mod answers;
mod executor;
mod faults;
mod support;
