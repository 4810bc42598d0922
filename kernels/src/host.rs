//! What the CPU ops run on: an instruction set and threads.

use crate::simd::Isa;
use crate::threads::Threads;

/// Passed to every CPU op that computes.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) isa: Isa,
    pub(crate) threads: Threads,
}
