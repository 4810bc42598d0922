//! Opening a device, and what is asked of it beside ops.

use std::sync::{Arc, Mutex};

use super::attention::DecodeScratch;
use super::driver::Driver;
use super::flight::Flights;
use super::linear::Linear;
use super::memory::Memory;
use super::step::Steps;
use super::tensor::{CudaTensor, ELEMENT};
use super::upload::Upload;
use super::{CudaBackend, gated_linear};
use crate::device_memory::DeviceMemory;
use crate::error::KernelError;

impl CudaBackend {
    /// Device `ordinal` for models in bf16. With `graphs`, decode steps are recorded and replayed.
    ///
    /// # Errors
    /// [`KernelError::NoDevice`] if there is none that can be used; it says why.
    pub fn new(ordinal: usize, graphs: bool) -> Result<Self, KernelError> {
        let driver = Arc::new(Driver::open(ordinal)?);
        let memory = Arc::new(Memory::new(driver.clone()));
        let linear = Linear::new(&driver, &memory)?;
        gated_linear::prepare(&driver)?;
        let decode = DecodeScratch::new(&driver, &memory)?;
        let (counters, bytes) = decode.counters();
        let (steps, flights, upload) = (Steps::default(), Flights::default(), Upload::default());
        let waiting = Mutex::default();
        let backend = Self { steps, flights, upload, waiting, linear, decode, memory, driver, graphs };
        backend.zero(counters, bytes)?;
        Ok(backend)
    }

    /// Calls of the device's allocator so far: constant in a steady state.
    pub fn allocations(&self) -> u64 {
        self.memory.allocations()
    }

    /// What the device's memory holds now.
    ///
    /// # Errors
    /// The driver does not say.
    pub fn device_memory(&self) -> Result<DeviceMemory, KernelError> {
        self.memory.read()
    }

    /// What the device is: ordinal, name, compute capability.
    pub fn description(&self) -> String {
        let (major, minor) = self.driver.capability;
        format!("cuda:{} {} {major}.{minor}", self.driver.ordinal(), self.driver.name)
    }

    /// Waits for everything launched so far: for measurements.
    ///
    /// # Errors
    /// A launch failed.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        self.driver.synchronize()
    }

    /// An activation of `shape`, contents undefined.
    pub(super) fn activation(&self, shape: &[usize]) -> Result<CudaTensor, KernelError> {
        let bytes = shape.iter().product::<usize>() * ELEMENT;
        Ok(CudaTensor::piece(self.memory.piece(bytes)?, shape))
    }
}
