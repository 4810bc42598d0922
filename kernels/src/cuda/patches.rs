//! Patches on their way to the device: through page-locked buffers that many pages share, so that filling them waits neither for the
//! copy before nor for a step that is still running.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use half::bf16;

use super::CudaBackend;
use super::driver::{Argument, Driver, Launch};
use super::pinned::Pinned;
use super::tensor::{CudaTensor, ELEMENT};
use crate::error::KernelError;
use crate::patches::PatchPage;
use crate::view::shape_error;

/// Bytes of a buffer.
const BUFFER_BYTES: usize = 16 << 20;
/// Most buffers: the patches of a step and of the one before it fit (32,768 normalised patches of stills take 50 MB, of clips 100 MB;
/// samples take half of that).
const MOST_BUFFERS: usize = 12;
/// Parts of a buffer start at multiples of this.
const PART_ALIGN: usize = 512;
/// Elements that a thread normalises at once (VECTOR of numeric.cuh).
const VECTOR: usize = 8;
/// Threads of a block that normalises.
const BLOCK: usize = 256;

/// Buffers that are filled one behind the other, the first one now: many pages share one, and copies of earlier steps may still
/// be on their way from the others.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    buffers: VecDeque<Pinned>,
    /// Bytes of the first buffer that are in use.
    filled: usize,
}

impl Waiting {
    /// Starts a copy of `source` to `device`; the source may go once this returns. Waits only if all buffers are on their way.
    fn send(&mut self, driver: &Arc<Driver>, mut source: &[u8], mut device: u64) -> Result<(), KernelError> {
        while !source.is_empty() {
            if self.filled == BUFFER_BYTES || self.buffers.is_empty() {
                self.turn(driver)?;
            }
            let Some(buffer) = self.buffers.front_mut() else { break };
            let (part, rest) = source.split_at(source.len().min(BUFFER_BYTES - self.filled));
            buffer.send_from(self.filled, part, device)?;
            // The next part starts where it is copied fastest.
            self.filled = (self.filled + part.len()).next_multiple_of(PART_ALIGN).min(BUFFER_BYTES);
            (source, device) = (rest, device + part.len() as u64);
        }
        Ok(())
    }

    /// Puts an empty buffer first: that used longest ago, or a new one while that is on its way and there may be more.
    fn turn(&mut self, driver: &Arc<Driver>) -> Result<(), KernelError> {
        let free = match self.buffers.back() {
            Some(oldest) => self.buffers.len() == MOST_BUFFERS || oldest.idle()?,
            None => false,
        };
        let oldest = if free { self.buffers.pop_back() } else { None };
        let mut next = oldest.map_or_else(|| Pinned::new(driver, BUFFER_BYTES), Ok)?;
        next.open()?;
        self.buffers.push_front(next);
        self.filled = 0;
        Ok(())
    }
}

impl CudaBackend {
    /// See [`crate::Backend::patches`].
    pub(super) fn take_patches(&self, pages: &[PatchPage<'_>], temporal: usize) -> Result<CudaTensor, KernelError> {
        let op = "patches";
        let Some(&PatchPage { channels, area, .. }) = pages.first() else { return Err(shape_error(op, "no pages")) };
        let width = channels * temporal * area;
        let out = self.activation(&[pages.iter().map(|page| page.rows).sum(), width])?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut send = |source: &[u8], device: u64| waiting.send(&self.driver, source, device);
        let mut to = out.address();
        for page in pages {
            page.check(temporal)?;
            if page.channels != channels || page.area != area {
                return Err(shape_error(op, "pages of different patches"));
            }
            if page.dtype == candle_core::DType::U8 {
                let stored = self.memory.piece(page.bytes.len())?;
                send(page.bytes, stored.pointer)?;
                self.normalise_frames(page, temporal, stored.pointer, to)?;
            } else if page.dtype != candle_core::DType::BF16 {
                let floats = page.floats(temporal)?;
                let narrow: Vec<u8> =
                    floats.into_iter().flat_map(|value| bf16::from_f32(value).to_ne_bytes()).collect();
                send(&narrow, to)?;
            } else if page.slots == temporal {
                send(page.bytes, to)?;
            } else {
                let stored = self.memory.piece(page.bytes.len())?;
                send(page.bytes, stored.pointer)?;
                let frames = page.rows * channels;
                let [area, temporal] = [area, temporal].map(|size| Argument::Int(size as i32));
                let arguments = [Argument::Pointer(stored.pointer), Argument::Pointer(to), area, temporal];
                self.driver.launch("repeat_frames", Launch::rows(frames, 64).alone(), &arguments)?;
            }
            to += (page.rows * width * ELEMENT) as u64;
        }
        Ok(out)
    }

    /// Samples at `stored` to patches at `out`.
    fn normalise_frames(
        &self,
        page: &PatchPage<'_>,
        temporal: usize,
        stored: u64,
        out: u64,
    ) -> Result<(), KernelError> {
        let (shift, scale) = page.shift_and_scale().ok_or_else(|| shape_error("patches", "samples alone"))?;
        let frames = page.rows * page.channels * page.slots;
        let repeats = temporal / page.slots.max(1);
        let threads = frames * if page.area.is_multiple_of(VECTOR) { page.area / VECTOR } else { page.area };
        let mut arguments = vec![Argument::Pointer(stored), Argument::Pointer(out)];
        arguments.extend(shift.into_iter().chain(scale).map(Argument::Float));
        arguments.extend([page.area, page.slots, repeats, frames].map(|size| Argument::Int(size as i32)));
        self.driver.launch("normalise_frames", Launch::rows(threads.div_ceil(BLOCK), BLOCK as u32).alone(), &arguments)
    }
}
