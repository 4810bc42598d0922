//! The device operations of Millrace, each implemented twice: a CPU twin on candle-core tensors (the reference in tests
//! and the backend without a GPU) and, under feature `cuda`, our own device code.
//!
//! Owns the only `unsafe` in the tree. Must not know a model: model files are written against [`Backend`].

pub mod backend;
pub mod error;

pub use backend::{Backend, GeluKind, Ragged, RopeTable, Segments};
pub use error::KernelError;
