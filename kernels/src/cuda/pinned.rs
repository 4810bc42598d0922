//! Page-locked host memory: what the device copies from and to without a detour.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::driver::{Driver, failed};
use super::upload::{Plain, bytes_of};
use crate::device_memory::ByteSize;
use crate::error::KernelError;
use crate::view::shape_error;

/// A page-locked buffer and the event behind the last copy that used it.
#[derive(Debug)]
pub struct Pinned {
    driver: Arc<Driver>,
    pointer: *mut c_void,
    bytes: usize,
    event: sys::CUevent,
}

// SAFETY: the buffer belongs to this value alone.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(super) fn new(driver: &Arc<Driver>, bytes: usize) -> Result<Self, KernelError> {
        driver.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: `drop` frees what is allocated here.
        let pointer = unsafe { result::malloc_host(bytes, 0) }.map_err(|error| {
            let what = format!("{} of host memory cannot be page-locked: {error:?}", ByteSize(bytes as u64));
            KernelError::Device { op: "cuMemHostAlloc", what }
        })?;
        let event =
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed("cuEventCreate"))?;
        Ok(Self { driver: driver.clone(), pointer, bytes, event })
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it starts.
    pub(super) fn address(&self) -> u64 {
        self.pointer as u64
    }

    /// Notes that a copy was started on `stream`: [`Self::open`] waits for it.
    pub(super) fn used(&mut self, stream: sys::CUstream) -> Result<(), KernelError> {
        // SAFETY: both handles are valid and of one context, which the caller has bound.
        unsafe { result::event::record(self.event, stream) }.map_err(failed("cuEventRecord"))
    }

    /// Whether the last copy that used the buffer is done.
    pub fn idle(&self) -> Result<bool, KernelError> {
        self.driver.bind()?;
        // SAFETY: the event is valid; one that was never recorded counts as done.
        match unsafe { result::event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(failed("cuEventQuery")(error)),
        }
    }

    /// The buffer as bytes, once the last copy that used it is done.
    pub fn open(&mut self) -> Result<&mut [u8], KernelError> {
        self.driver.bind()?;
        // SAFETY: the event is valid; one that was never recorded counts as done.
        unsafe { result::event::synchronize(self.event) }.map_err(failed("cuEventSynchronize"))?;
        // SAFETY: the allocation has this size, and no copy uses it any more.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes) })
    }

    /// Puts the bytes of `values` at the start, once the last copy that used the buffer is done.
    pub(super) fn write<T: Plain>(&mut self, values: &[T]) -> Result<(), KernelError> {
        let source = bytes_of(values);
        let target = self.open()?.get_mut(..source.len());
        let target = target.ok_or_else(|| shape_error("pinned", format!("no room for {} bytes", source.len())))?;
        target.copy_from_slice(source);
        Ok(())
    }

    /// Starts a copy of the first `bytes` to `device`.
    pub(super) fn send(&mut self, device: u64, bytes: usize) -> Result<(), KernelError> {
        let stream = self.driver.stream()?;
        // SAFETY: both ends hold `bytes`; the buffer is not opened before the event has passed.
        unsafe {
            let source = std::slice::from_raw_parts(self.pointer.cast::<u8>(), bytes.min(self.bytes));
            result::memcpy_htod_async(device, source, stream).map_err(failed("cuMemcpyHtoDAsync"))?;
            result::event::record(self.event, stream).map_err(failed("cuEventRecord"))
        }
    }

    /// Puts `source` at `offset` and starts its copy to `device`. No copy since the last [`Self::open`] used this place.
    pub fn send_from(&mut self, offset: usize, source: &[u8], device: u64) -> Result<(), KernelError> {
        let stream = self.driver.stream()?;
        if offset + source.len() > self.bytes {
            return Err(shape_error("pinned", format!("no room for {} bytes at {offset}", source.len())));
        }
        // SAFETY: the place is inside the buffer and, as the caller promises, no copy reads it; the rest is as in `send`.
        unsafe {
            let place = std::slice::from_raw_parts_mut(self.pointer.cast::<u8>().add(offset), source.len());
            place.copy_from_slice(source);
            result::memcpy_htod_async(device, place, stream).map_err(failed("cuMemcpyHtoDAsync"))?;
            result::event::record(self.event, stream).map_err(failed("cuEventRecord"))
        }
    }

    /// Starts a copy of `bytes` from `device`; [`Self::open`] waits for it.
    pub(super) fn receive(&mut self, device: u64, bytes: usize) -> Result<(), KernelError> {
        let stream = self.driver.stream()?;
        // SAFETY: as in `send`.
        unsafe {
            let target = std::slice::from_raw_parts_mut(self.pointer.cast::<u8>(), bytes.min(self.bytes));
            result::memcpy_dtoh_async(target, device, stream).map_err(failed("cuMemcpyDtoHAsync"))?;
            result::event::record(self.event, stream).map_err(failed("cuEventRecord"))
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.open().is_ok() {
            // SAFETY: no copy uses the buffer; both handles are freed once.
            unsafe {
                let _ = result::free_host(self.pointer);
                let _ = result::event::destroy(self.event);
            }
        }
    }
}
