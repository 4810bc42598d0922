//! Steps under way: where a step begins and ends on the device's clock, and page-locked memory for what it draws, so that the host
//! waits for one step while the next one is in the stream already.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::{result, sys};

use super::CudaBackend;
use super::driver::{Argument, Driver, Launch, failed};
use super::pinned::Pinned;
use super::step::CudaLogits;
use crate::error::KernelError;
use crate::step::{Draw, Finished, StepTimes};
use crate::view::shape_error;

/// Size of `Shared` in sample.cu, rounded up.
const SHARED_BYTES: usize = 40 * 1024;
/// Rows that a flight has room for from the start.
const USUAL_ROWS: usize = 512;

/// A moment in the stream.
#[derive(Debug)]
struct Moment {
    driver: Arc<Driver>,
    event: sys::CUevent,
}

// SAFETY: the event belongs to this value, and every use binds the context first.
unsafe impl Send for Moment {}

impl Moment {
    fn new(driver: &Arc<Driver>) -> Result<Self, KernelError> {
        driver.bind()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("cuEventCreate"))?;
        Ok(Self { driver: driver.clone(), event })
    }

    /// Is now: behind everything launched so far.
    fn record(&self) -> Result<(), KernelError> {
        let stream = self.driver.stream()?;
        // SAFETY: event and stream are valid.
        unsafe { result::event::record(self.event, stream) }.map_err(failed("cuEventRecord"))
    }

    fn has_passed(&self) -> Result<bool, KernelError> {
        self.driver.bind()?;
        // SAFETY: the event is valid.
        match unsafe { result::event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(failed("cuEventQuery")(error)),
        }
    }

    fn wait(&self) -> Result<(), KernelError> {
        self.driver.bind()?;
        // SAFETY: the event is valid.
        unsafe { result::event::synchronize(self.event) }.map_err(failed("cuEventSynchronize"))
    }

    /// From `earlier` to this one; both have passed.
    fn since(&self, earlier: &Self) -> Result<Duration, KernelError> {
        self.driver.bind()?;
        // SAFETY: both events are valid and of one stream.
        let millis = unsafe { result::event::elapsed(earlier.event, self.event) };
        let millis = millis.map_err(failed("cuEventElapsedTime"))?;
        Ok(Duration::from_secs_f64(f64::from(millis.max(0.0)) / 1e3))
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        if self.driver.bind().is_ok() {
            // SAFETY: destroyed once; the driver keeps what is under way.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

/// A step under way. Used again for another step once it and the one behind it have ended.
#[derive(Debug)]
pub struct CudaFlight {
    begin: Moment,
    end: Moment,
    /// What to draw, on its way to the device.
    draws: Pinned,
    /// Winners, on their way to the host.
    winners: Pinned,
    rows: usize,
}

impl CudaFlight {
    fn new(driver: &Arc<Driver>) -> Result<Self, KernelError> {
        let (draws, winners) =
            (Pinned::new(driver, USUAL_ROWS * size_of::<Draw>())?, Pinned::new(driver, USUAL_ROWS * 4)?);
        Ok(Self { begin: Moment::new(driver)?, end: Moment::new(driver)?, draws, winners, rows: 0 })
    }
}

/// All flights that are not with a caller.
#[derive(Debug, Default)]
pub(super) struct Flights {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The step that has begun and not been finished.
    begun: Option<CudaFlight>,
    /// The step that ended last, as the host knows: the next one's idle time counts from its end.
    last: Option<CudaFlight>,
    free: Vec<CudaFlight>,
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The step that has begun; one that begins now if none has.
    fn take_begun(&mut self, driver: &Arc<Driver>) -> Result<CudaFlight, KernelError> {
        if let Some(flight) = self.begun.take() {
            return Ok(flight);
        }
        let flight = self.free.pop().map_or_else(|| CudaFlight::new(driver), Ok)?;
        flight.begin.record()?;
        Ok(flight)
    }
}

impl CudaBackend {
    /// See [`crate::Backend::begin`].
    pub(super) fn begin_step(&self) -> Result<(), KernelError> {
        let state = &mut *self.flights.lock();
        state.begun = Some(state.take_begun(&self.driver)?);
        Ok(())
    }

    /// See [`crate::Backend::finish`]. Greedy draws are part of the step already.
    pub(super) fn finish_step(&self, drawn: Option<(&CudaLogits, &[Draw])>) -> Result<CudaFlight, KernelError> {
        let mut flight = self.flights.lock().take_begun(&self.driver)?;
        flight.rows = 0;
        if let Some((logits, draws)) = drawn {
            self.draw_rows(&mut flight, logits, draws)?;
        }
        self.steps.drawn(flight.rows);
        flight.end.record()?;
        Ok(flight)
    }

    fn draw_rows(&self, flight: &mut CudaFlight, logits: &CudaLogits, draws: &[Draw]) -> Result<(), KernelError> {
        let rows = logits.rows;
        if draws.len() != rows {
            return Err(shape_error("draw", format!("{} draws for {rows} rows", draws.len())));
        }
        let host_bytes = size_of_val(draws);
        for (buffer, bytes) in [(&mut flight.draws, host_bytes), (&mut flight.winners, 4 * rows)] {
            if buffer.bytes() < bytes {
                *buffer = Pinned::new(&self.driver, bytes.next_power_of_two())?;
            }
        }
        if draws.iter().any(|draw| draw.temperature > 0.0) {
            let (_, width) = logits.logits.matrix("draw")?;
            let staged = self.memory.piece(host_bytes)?;
            flight.draws.write(draws)?;
            flight.draws.send(staged.pointer, host_bytes)?;
            let (winners, draws) = (Argument::Pointer(logits.winners), Argument::Pointer(staged.pointer));
            let arguments = [logits.logits.argument(), winners, draws, Argument::Int(width as i32)];
            self.driver.launch("sample_rows", Launch::rows(rows, 1024).shared(SHARED_BYTES).alone(), &arguments)?;
        }
        if rows > 0 {
            flight.winners.receive(logits.winners, 4 * rows)?;
        }
        flight.rows = rows;
        Ok(())
    }

    /// See [`crate::Backend::has_finished`].
    pub(super) fn flight_has_finished(&self, flight: &CudaFlight) -> Result<bool, KernelError> {
        flight.end.has_passed()
    }

    /// See [`crate::Backend::finished`].
    pub(super) fn land(&self, mut flight: CudaFlight) -> Result<Finished, KernelError> {
        flight.end.wait()?;
        let winner = |bytes: &[u8; 4]| Some(u32::from_ne_bytes(*bytes)).filter(|winner| *winner != u32::MAX);
        let drawn = flight.winners.open()?.as_chunks().0.iter().take(flight.rows).map(winner).collect();
        let busy = flight.end.since(&flight.begin)?;
        let state = &mut *self.flights.lock();
        let idle = state.last.as_ref().map_or(Ok(Duration::ZERO), |last| flight.begin.since(&last.end))?;
        state.free.extend(state.last.replace(flight));
        Ok(Finished { drawn, times: Some(StepTimes { busy, idle }) })
    }
}
