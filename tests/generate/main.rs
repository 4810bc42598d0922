//! `millrace generate`: every flag on the real binary and a small real checkpoint, and every kind of bad input.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.

mod bad_input;
mod flags;
mod program;
