//! Device memory: allocations that stay (weights, pools), and activations out of slabs; counted by kind.
//!
//! Activations live in slabs (`slabs.rs`) and are given back when the last tensor is dropped; everything runs on one stream, so
//! memory that was given back may be written by the next op at once. In a steady state nothing is allocated, which
//! [`Memory::allocations`] shows. The same sequence of ops starting from empty slabs gets the same addresses, which is what a
//! recorded step relies on; recorded steps have slabs of their own, and so has what outlives a step: it would leave the others
//! in pieces.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::driver::{Driver, failed};
use crate::device_memory::{DeviceMemory, MemoryKind};
use crate::error::KernelError;
use crate::slabs::{Place, SlabBook};

/// Bytes held by kind, and calls of the driver's allocator.
#[derive(Debug, Default)]
struct Counters {
    held: [AtomicU64; MemoryKind::ALL.len()],
    allocations: AtomicU64,
}

/// An allocation of its own, freed when dropped.
#[derive(Debug)]
pub(super) struct Owned {
    driver: Arc<Driver>,
    counters: Arc<Counters>,
    kind: MemoryKind,
    bytes: u64,
    pub pointer: u64,
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.counters.held[self.kind as usize].fetch_sub(self.bytes, Ordering::Relaxed);
        if self.driver.bind().is_ok() {
            // SAFETY: allocated by `Memory::allocate`, freed once. The driver waits for work that uses it.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

/// Slabs and the books of them.
#[derive(Debug, Default)]
struct Slabs(Mutex<(SlabBook, Vec<Owned>)>);

impl Slabs {
    fn lock(&self) -> MutexGuard<'_, (SlabBook, Vec<Owned>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A piece of a slab, given back when dropped.
#[derive(Debug)]
pub(super) struct Piece {
    slabs: Arc<Slabs>,
    place: Place,
    pub pointer: u64,
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.slabs.lock().0.give_back(self.place);
    }
}

/// All memory of one device.
#[derive(Debug)]
pub(super) struct Memory {
    driver: Arc<Driver>,
    counters: Arc<Counters>,
    /// Activations of ordinary steps.
    plain: Arc<Slabs>,
    /// Activations of steps that are recorded.
    recorded: Arc<Slabs>,
    /// What outlives a step.
    features: Arc<Slabs>,
    recording: AtomicBool,
}

impl Memory {
    pub fn new(driver: Arc<Driver>) -> Self {
        let (plain, recorded, features) = (Arc::default(), Arc::default(), Arc::default());
        Self { driver, counters: Arc::default(), plain, recorded, features, recording: AtomicBool::new(false) }
    }

    /// Calls of the driver's allocator so far.
    pub fn allocations(&self) -> u64 {
        self.counters.allocations.load(Ordering::Relaxed)
    }

    /// What the device holds now.
    pub fn read(&self) -> Result<DeviceMemory, KernelError> {
        let (free, total) = self.driver.memory()?;
        Ok(DeviceMemory {
            held: self.counters.held.each_ref().map(|bytes| bytes.load(Ordering::Relaxed)),
            free_bytes: free as u64,
            total_bytes: total as u64,
            allocations: self.allocations(),
        })
    }

    /// Takes activations from the recorded steps' slabs from now on, or no longer.
    pub fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    /// A failed driver call that takes memory for `kind`: [`KernelError::OutOfMemory`] if that is why.
    pub fn failed(&self, call: &'static str, kind: MemoryKind, bytes: usize) -> impl Fn(DriverError) -> KernelError {
        move |error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => KernelError::OutOfMemory {
                kind,
                asked_bytes: bytes as u64,
                memory: Box::new(self.read().unwrap_or_default()),
            },
            _ => failed(call)(error),
        }
    }

    /// An allocation of its own of `bytes`, contents undefined.
    pub fn allocate(&self, kind: MemoryKind, bytes: usize) -> Result<Owned, KernelError> {
        self.driver.bind()?;
        self.counters.allocations.fetch_add(1, Ordering::Relaxed);
        let bytes = bytes.max(1);
        // SAFETY: contents are written before they are read, by whoever asked.
        let pointer = unsafe { result::malloc_sync(bytes) }.map_err(self.failed("cuMemAlloc", kind, bytes))?;
        self.counters.held[kind as usize].fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Owned { driver: self.driver.clone(), counters: self.counters.clone(), kind, bytes: bytes as u64, pointer })
    }

    /// A piece of `bytes` for an activation, contents undefined.
    pub fn piece(&self, bytes: usize) -> Result<Piece, KernelError> {
        match self.recording.load(Ordering::Relaxed) {
            true => self.piece_of(&self.recorded, MemoryKind::RecordedSteps, bytes),
            false => self.piece_of(&self.plain, MemoryKind::Activations, bytes),
        }
    }

    /// A piece of `bytes` for something that outlives a step, contents undefined.
    pub fn feature(&self, bytes: usize) -> Result<Piece, KernelError> {
        self.piece_of(&self.features, MemoryKind::Features, bytes)
    }

    /// Makes one slab of those of ordinary steps, as large as they were ever full, if nothing lies in them.
    pub fn join_slabs(&self) -> Result<(), KernelError> {
        let mut list = self.plain.lock();
        let (book, owned) = &mut *list;
        let Some(bytes) = book.joined_bytes() else { return Ok(()) };
        self.driver.synchronize()?;
        owned.clear();
        *book = SlabBook::default();
        owned.push(self.allocate(MemoryKind::Activations, bytes)?);
        book.add(bytes);
        Ok(())
    }

    fn piece_of(&self, slabs: &Arc<Slabs>, kind: MemoryKind, bytes: usize) -> Result<Piece, KernelError> {
        let mut list = slabs.lock();
        let (book, owned) = &mut *list;
        let place = match book.take(bytes) {
            Some(place) => Some(place),
            None => {
                let size = SlabBook::slab_bytes(bytes);
                owned.push(self.allocate(kind, size)?);
                book.add(size);
                book.take(bytes)
            }
        };
        let found = place.and_then(|place| Some((place, owned.get(place.slab)?.pointer + place.offset as u64)));
        let lost = || KernelError::Device { op: "slabs", what: format!("no place for {bytes} bytes") };
        let (place, pointer) = found.ok_or_else(lost)?;
        Ok(Piece { slabs: slabs.clone(), place, pointer })
    }
}
