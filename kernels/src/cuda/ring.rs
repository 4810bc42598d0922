//! Page-locked memory that small inputs pass through on their way to the device: from pageable memory the driver may wait for the
//! stream, and with it for a whole step.

use std::sync::Arc;

use super::driver::Driver;
use super::pinned::Pinned;
use crate::error::KernelError;

/// Bytes of one buffer, and so of the largest input.
const CHUNK_BYTES: usize = 4 << 20;
/// Buffers: enough that one is free again, its copies done, when all others have been filled by the steps under way.
const CHUNKS: usize = 4;
/// Inputs begin at multiples of this.
const ALIGN: usize = 16;

/// Buffers that are filled one behind the other and used again in turn.
#[derive(Debug, Default)]
pub(super) struct Ring {
    chunks: Vec<Pinned>,
    /// The buffer that is being filled, and how far.
    current: usize,
    used: usize,
}

impl Ring {
    /// Starts a copy of `source` to `device`; `source` may go once this returns. `false` if it is too large.
    pub fn send(&mut self, driver: &Arc<Driver>, source: &[u8], device: u64) -> Result<bool, KernelError> {
        if source.len() > CHUNK_BYTES {
            return Ok(false);
        }
        if self.used + source.len() > CHUNK_BYTES || self.chunks.is_empty() {
            if self.chunks.len() < CHUNKS {
                self.chunks.push(Pinned::new(driver, CHUNK_BYTES)?);
            }
            self.current = (self.current + 1) % self.chunks.len();
            self.used = 0;
            self.chunks[self.current].open()?;
        }
        self.chunks[self.current].send_from(self.used, source, device)?;
        self.used = (self.used + source.len()).next_multiple_of(ALIGN);
        Ok(true)
    }
}
