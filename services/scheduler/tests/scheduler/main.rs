//! The scheduler actor over a real NATS server, with executors and preprocess actors that speak the protocol.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test may end by panicking; clippy exempts only the test functions.
mod answers;
mod executor;
mod faults;
mod pairs;
mod support;
