//! Device memory: allocations that stay (weights, pools), and activations out of slabs.
//!
//! Activations live in slabs that are carved first fit and given back when the last tensor is dropped; everything runs on one
//! stream, so memory that was given back may be written by the next op at once. Slabs are added when they are full and never
//! returned: in a steady state nothing is allocated, which [`Memory::allocations`] shows. The same sequence of ops starting
//! from empty slabs gets the same addresses, which is what a recorded step relies on; recorded steps have slabs of their own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result;

use super::driver::{Driver, failed};
use crate::error::KernelError;

/// Alignment of every piece.
const ALIGN: usize = 512;
/// Smallest slab.
const SLAB_BYTES: usize = 64 << 20;

/// An allocation of its own, freed when dropped.
#[derive(Debug)]
pub(super) struct Owned {
    driver: Arc<Driver>,
    pub pointer: u64,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.driver.bind().is_ok() {
            // SAFETY: allocated by `Memory::allocate`, freed once. The driver waits for work that uses it.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

/// One slab and its free pieces (offset, bytes) in order.
#[derive(Debug)]
struct Slab {
    memory: Owned,
    free: Vec<(usize, usize)>,
}

/// A list of slabs.
#[derive(Debug, Default)]
struct Slabs(Mutex<Vec<Slab>>);

impl Slabs {
    fn lock(&self) -> MutexGuard<'_, Vec<Slab>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// First free piece of `bytes`, taken out of the list.
fn take(free: &mut Vec<(usize, usize)>, bytes: usize) -> Option<usize> {
    let at = free.iter().position(|(_, length)| *length >= bytes)?;
    let (offset, length) = free[at];
    if length == bytes {
        free.remove(at);
    } else {
        free[at] = (offset + bytes, length - bytes);
    }
    Some(offset)
}

/// Puts a piece back and joins it with its neighbours.
fn give_back(free: &mut Vec<(usize, usize)>, offset: usize, bytes: usize) {
    let at = free.partition_point(|(start, _)| *start < offset);
    free.insert(at, (offset, bytes));
    if at + 1 < free.len() && free[at].0 + free[at].1 == free[at + 1].0 {
        free[at].1 += free[at + 1].1;
        free.remove(at + 1);
    }
    if at > 0 && free[at - 1].0 + free[at - 1].1 == free[at].0 {
        free[at - 1].1 += free[at].1;
        free.remove(at);
    }
}

/// A piece of a slab, given back when dropped.
#[derive(Debug)]
pub(super) struct Piece {
    slabs: Arc<Slabs>,
    slab: usize,
    offset: usize,
    bytes: usize,
    pub pointer: u64,
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(slab) = self.slabs.lock().get_mut(self.slab) {
            give_back(&mut slab.free, self.offset, self.bytes);
        }
    }
}

/// All memory of one device.
#[derive(Debug)]
pub(super) struct Memory {
    driver: Arc<Driver>,
    allocations: AtomicU64,
    /// Activations of ordinary steps.
    plain: Arc<Slabs>,
    /// Activations of steps that are recorded.
    recorded: Arc<Slabs>,
    recording: AtomicBool,
}

impl Memory {
    pub fn new(driver: Arc<Driver>) -> Self {
        let (plain, recorded) = (Arc::default(), Arc::default());
        Self { driver, allocations: AtomicU64::new(0), plain, recorded, recording: AtomicBool::new(false) }
    }

    /// Calls of the driver's allocator so far.
    pub fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Takes activations from the recorded steps' slabs from now on, or no longer.
    pub fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    /// An allocation of its own of `bytes`, contents undefined.
    pub fn allocate(&self, bytes: usize) -> Result<Owned, KernelError> {
        self.driver.bind()?;
        self.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: contents are written before they are read, by whoever asked.
        let pointer = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| match error.0 {
            cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free_bytes, total_bytes) = self.driver.memory().unwrap_or_default();
                KernelError::OutOfMemory { asked_bytes: bytes, free_bytes, total_bytes }
            }
            _ => failed("cuMemAlloc")(error),
        })?;
        Ok(Owned { driver: self.driver.clone(), pointer })
    }

    /// A piece of `bytes` for an activation, contents undefined.
    pub fn piece(&self, bytes: usize) -> Result<Piece, KernelError> {
        let slabs = if self.recording.load(Ordering::Relaxed) { &self.recorded } else { &self.plain };
        let bytes = bytes.max(1).next_multiple_of(ALIGN);
        let mut list = slabs.lock();
        let found = list.iter_mut().enumerate().find_map(|(n, slab)| Some((n, take(&mut slab.free, bytes)?)));
        let (slab, offset) = match found {
            Some(found) => found,
            None => {
                let size = bytes.next_multiple_of(SLAB_BYTES);
                let memory = self.allocate(size)?;
                let free = if size > bytes { vec![(bytes, size - bytes)] } else { Vec::new() };
                list.push(Slab { memory, free });
                (list.len() - 1, 0)
            }
        };
        let pointer = list.get(slab).map_or(0, |slab| slab.memory.pointer + offset as u64);
        Ok(Piece { slabs: slabs.clone(), slab, offset, bytes, pointer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_when_they_come_back() {
        let mut free = vec![(0, 100)];
        let pieces: Vec<usize> = [10, 20, 30].iter().map(|&bytes| take(&mut free, bytes).unwrap()).collect();
        assert_eq!((pieces.as_slice(), free.as_slice()), ([0, 10, 30].as_slice(), [(60, 40)].as_slice()));
        give_back(&mut free, 10, 20);
        assert_eq!(free, [(10, 20), (60, 40)]);
        assert_eq!(take(&mut free, 21), Some(60));
        give_back(&mut free, 60, 21);
        give_back(&mut free, 0, 10);
        assert_eq!(free, [(0, 30), (60, 40)]);
        give_back(&mut free, 30, 30);
        assert_eq!(free, [(0, 100)]);
        assert_eq!(take(&mut free, 101), None);
    }
}
