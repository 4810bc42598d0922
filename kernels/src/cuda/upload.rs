//! Copies between host and device: weights through two page-locked buffers, small inputs through a ring, results back.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::result;
use half::bf16;

use super::CudaBackend;
use super::driver::failed;
use super::memory::Piece;
use super::pinned::Pinned;
use super::ring::Ring;
use super::tensor::{CudaTensor, ELEMENT};
use crate::device_memory::MemoryKind;
use crate::error::KernelError;
use crate::mapped::{MappedFile, check_pieces};

/// Bytes of each of the two buffers that weights pass through.
const CHUNK_BYTES: usize = 32 << 20;
/// Threads that fill a buffer, and bytes from which one more pays: a thread alone copies slower than the device takes it.
const FILLERS: usize = 4;
const FILLER_BYTES: usize = 2 << 20;

/// Page-locked buffers: two for weights, so that one is filled while the other is copied, one for results, some for small inputs.
#[derive(Debug, Default)]
pub(super) struct Upload {
    buffers: Mutex<Vec<Pinned>>,
    results: Mutex<Option<Pinned>>,
    ring: Mutex<Ring>,
}

/// Plain values whose bytes may be copied.
pub(super) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for f32 {}
impl Plain for bf16 {}
// No padding: five fields that fill their 24 bytes.
impl Plain for crate::step::Draw {}

/// The bytes of `values`.
pub(super) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` types have no padding, and any bytes may be read as u8.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Copies on several threads.
fn fill(target: &mut [u8], source: &[u8]) {
    let threads = (source.len() / FILLER_BYTES).clamp(1, FILLERS);
    if threads == 1 {
        return target.copy_from_slice(source);
    }
    let share = source.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for (target, source) in target.chunks_mut(share).zip(source.chunks(share)) {
            scope.spawn(|| target.copy_from_slice(source));
        }
    });
}

impl CudaBackend {
    /// A weight in bf16, in an allocation of its own.
    pub(super) fn take_weight(&self, host: &candle_core::Tensor) -> Result<CudaTensor, KernelError> {
        let host = host.to_device(&candle_core::Device::Cpu)?.to_dtype(candle_core::DType::BF16)?.contiguous()?;
        let view = crate::view::View::<bf16>::new("weight", &host)?;
        let source = bytes_of(view.data()?);
        let memory = self.memory.allocate(MemoryKind::Weights, source.len())?;
        self.stream(source, memory.pointer)?;
        Ok(CudaTensor::owned(memory, host.dims()))
    }

    /// A bf16 weight straight out of mapped files. Their pages do not stay in this process's memory.
    pub(super) fn stream_weight(
        &self,
        pieces: &[(&MappedFile, Range<usize>)],
        shape: &[usize],
    ) -> Result<CudaTensor, KernelError> {
        let memory = self.memory.allocate(MemoryKind::Weights, check_pieces(pieces, ELEMENT, shape)? * ELEMENT)?;
        let mut to = memory.pointer;
        for (file, range) in pieces {
            self.stream(&file.bytes()[range.clone()], to)?;
            file.release(range);
            to += range.len() as u64;
        }
        Ok(CudaTensor::owned(memory, shape))
    }

    /// Starts a copy of much data to `device` through the two buffers.
    fn stream(&self, source: &[u8], device: u64) -> Result<(), KernelError> {
        let mut buffers = self.upload.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        while buffers.len() < 2 {
            buffers.push(Pinned::new(&self.driver, CHUNK_BYTES)?);
        }
        for (n, chunk) in source.chunks(CHUNK_BYTES).enumerate() {
            // The buffer used longer ago is free sooner.
            buffers.swap(0, 1);
            let buffer = &mut buffers[0];
            fill(&mut buffer.open()?[..chunk.len()], chunk);
            buffer.send(device + (n * CHUNK_BYTES) as u64, chunk.len())?;
        }
        Ok(())
    }

    /// Starts a copy of `values` to `device`; the values may go once this returns.
    pub(super) fn write<T: Plain>(&self, values: &[T], device: u64) -> Result<(), KernelError> {
        if values.is_empty() {
            return Ok(());
        }
        let source = bytes_of(values);
        let sent =
            self.upload.ring.lock().unwrap_or_else(PoisonError::into_inner).send(&self.driver, source, device)?;
        if sent { Ok(()) } else { self.stream(source, device) }
    }

    /// `values` in a piece of the activations' memory.
    pub(super) fn staged<T: Plain>(&self, values: &[T]) -> Result<Piece, KernelError> {
        let piece = self.memory.piece(size_of_val(values))?;
        self.write(values, piece.pointer)?;
        Ok(piece)
    }

    /// Starts a copy of `bytes` on the device.
    pub(super) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.driver.stream()?;
        // SAFETY: both ends hold `bytes`; callers pass whole tensors.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }.map_err(failed("cuMemcpyDtoDAsync"))
    }

    pub(super) fn zero(&self, device: u64, bytes: usize) -> Result<(), KernelError> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.driver.stream()?;
        // SAFETY: the target holds `bytes`.
        unsafe { result::memset_d8_async(device, 0, bytes, stream) }.map_err(failed("cuMemsetD8Async"))
    }

    /// Waits, then hands `bytes` at `device` to `take`.
    fn fetch<R>(&self, device: u64, bytes: usize, take: impl Fn(&[u8]) -> R) -> Result<R, KernelError> {
        let mut results = self.upload.results.lock().unwrap_or_else(PoisonError::into_inner);
        if results.as_ref().is_none_or(|buffer| buffer.bytes() < bytes) {
            *results = Some(Pinned::new(&self.driver, bytes.next_power_of_two().max(4096))?);
        }
        let Some(buffer) = results.as_mut().filter(|_| bytes > 0) else { return Ok(take(&[])) };
        buffer.receive(device, bytes)?;
        Ok(take(&buffer.open()?[..bytes]))
    }

    /// `count` bf16 at `device` as f32.
    pub(super) fn read(&self, device: u64, count: usize) -> Result<Vec<f32>, KernelError> {
        let widen = |pair: &[u8; 2]| bf16::from_ne_bytes(*pair).to_f32();
        self.fetch(device, count * ELEMENT, |bytes| bytes.as_chunks().0.iter().map(widen).collect())
    }
}
