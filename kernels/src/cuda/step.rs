//! Running a step: staging, and recording of decode steps as CUDA graphs.
//!
//! A step in which every sequence has one row is recorded for its batch size, rounded up, the first time it comes (it runs
//! unrecorded then, so that every kernel is loaded), and replayed with other inputs after that. How wide its block table is
//! stands among the inputs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result, sys};

use super::CudaBackend;
use super::driver::{Driver, failed};
use super::memory::Owned;
use super::pinned::Pinned;
use super::staging::Sizes;
use super::tensor::CudaTensor;
use crate::device_memory::MemoryKind;
use crate::error::KernelError;
use crate::step::{Forward, Staged, StepInputs};

/// Most sequences of a recorded step.
const MOST_RECORDED: usize = 512;
/// Inputs that there is room for from the start, and by how much there is more if that is not enough: 512 sequences of 32k tokens.
const STAGING_BYTES: usize = 4 << 20;
/// The same of draws: 16,384.
const WINNERS_BYTES: usize = 4 << 14;

/// Batch size that `sequences` are padded to: exact up to 8, then in steps of about an eighth.
pub(super) fn bucket(sequences: usize) -> usize {
    match sequences {
        0..=8 => sequences.max(1),
        _ => sequences.next_multiple_of(sequences.next_power_of_two() / 8),
    }
}

/// Every size that up to `most` sequences are padded to.
pub(super) fn buckets(most: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> = (1..=most.min(MOST_RECORDED)).map(bucket).collect();
    sizes.dedup();
    sizes
}

/// Logits of the last step, and the greedy draw of each row.
#[derive(Debug)]
pub struct CudaLogits {
    /// `[rows or more, V]`.
    pub(super) logits: CudaTensor,
    /// u32 of each row.
    pub(super) winners: u64,
    /// Rows that were asked for.
    pub(super) rows: usize,
}

/// A recorded step.
#[derive(Debug)]
struct Recording {
    driver: Arc<Driver>,
    graph: sys::CUgraphExec,
    logits: CudaTensor,
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.driver.synchronize().is_ok() {
            // SAFETY: instantiated in `record`, destroyed once, and no replay is under way.
            let _ = unsafe { result::graph::exec_destroy(self.graph) };
        }
    }
}

// SAFETY: the graph belongs to this value, and every use binds the context first.
unsafe impl Send for Recording {}

/// Everything that steps share.
#[derive(Debug, Default)]
pub(super) struct Steps {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Host copies of the inputs under way, the one used longer ago first.
    host: [Option<Pinned>; 2],
    /// Inputs of every step on the device. One buffer is enough for steps that run ahead of the host: the stream copies a step's
    /// inputs behind the step before.
    staging: Kept,
    /// Draws of the last step. One is enough as well: the stream copies them to the host, and the next step reads them, before
    /// it draws.
    winners: Kept,
    /// Rows that the last step drew for.
    drawn: usize,
    /// By their batch sizes. All of them hold the addresses of `staging` and `winners`.
    recordings: HashMap<usize, Recording>,
}

/// A device buffer that is kept from step to step.
#[derive(Debug, Default)]
struct Kept {
    memory: Option<Owned>,
    bytes: usize,
}

impl Kept {
    fn pointer(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.pointer)
    }

    /// Room for `bytes`, in units of `unit`; what it holds stays. Whether it lies elsewhere now.
    fn grow(&mut self, backend: &CudaBackend, bytes: usize, unit: usize) -> Result<bool, KernelError> {
        if bytes <= self.bytes && self.memory.is_some() {
            return Ok(false);
        }
        let bytes = bytes.max(1).next_multiple_of(unit);
        let memory = backend.memory.allocate(MemoryKind::Scratch, bytes)?;
        backend.copy(self.pointer(), memory.pointer, self.bytes)?;
        backend.driver.synchronize()?;
        *self = Self { memory: Some(memory), bytes };
        Ok(true)
    }
}

impl Steps {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The step that ends now drew for `rows` rows.
    pub fn drawn(&self, rows: usize) {
        self.lock().drawn = rows;
    }
}

impl State {
    /// Makes room for a step of `sizes`. Where that lies elsewhere than before, nothing recorded is of use.
    fn make_room(&mut self, backend: &CudaBackend, sizes: Sizes) -> Result<(), KernelError> {
        let moved = self.staging.grow(backend, 4 * sizes.words(), STAGING_BYTES)?;
        if self.winners.grow(backend, 4 * sizes.logit_rows, WINNERS_BYTES)? || moved {
            self.recordings.clear();
        }
        Ok(())
    }

    /// Copies `inputs`, laid out by `sizes`, to the device.
    fn copy(&mut self, backend: &CudaBackend, sizes: Sizes, inputs: &StepInputs) -> Result<(), KernelError> {
        let bytes = 4 * sizes.words();
        // The buffer used longer ago: the step that runs now has read it.
        self.host.swap(0, 1);
        let [_, host] = &mut self.host;
        if host.as_ref().is_none_or(|host| host.bytes() < bytes) {
            *host = Some(Pinned::new(&backend.driver, self.staging.bytes)?);
        }
        let Some(host) = host else { return Ok(()) };
        let (head, words, _) = {
            let open = host.open()?;
            // SAFETY: any bytes are valid u32, and page-locked memory is page-aligned.
            unsafe { open.align_to_mut::<u32>() }
        };
        debug_assert!(head.is_empty());
        sizes.fill(inputs, words)?;
        backend.begin_step()?;
        host.send(self.staging.pointer(), bytes)
    }
}

impl CudaBackend {
    /// See [`crate::Backend::step`].
    pub(super) fn run_step<E: From<KernelError>>(
        &self,
        inputs: StepInputs,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<CudaLogits, E> {
        let exact = Sizes::of(&inputs);
        let sequences = exact.sequences;
        inputs.check_drawn(self.steps.lock().drawn)?;
        let recorded = self.graphs && inputs.replayable && (1..=MOST_RECORDED).contains(&sequences);
        let padded = bucket(sequences);
        let sizes = match recorded {
            true => Sizes { rows: padded, sequences: padded, logit_rows: padded, tail: 0, ..exact },
            false => exact,
        };
        let rows = inputs.logit_rows.len();
        let mut state = self.steps.lock();
        state.make_room(self, sizes)?;
        state.copy(self, sizes, &inputs)?;
        let winners = state.winners.pointer();
        if recorded && let Some(Recording { graph, logits, .. }) = state.recordings.get(&padded) {
            let stream = self.driver.stream()?;
            // SAFETY: graph and stream are valid, and everything the graph touches is kept.
            unsafe { result::graph::launch(*graph, stream) }.map_err(failed("cuGraphLaunch"))?;
            return Ok(CudaLogits { logits: logits.clone(), winners, rows });
        }
        let staged = sizes.parts_at(state.staging.pointer(), &inputs);
        drop(state);
        let staged = Staged { ids: staged.ids.with_draws(winners), ..staged };
        let logits = match recorded {
            true => self.run_first(&staged, padded, winners, forward)?,
            false => self.run_once(&staged, winners, forward)?,
        };
        Ok(CudaLogits { logits, winners, rows })
    }

    fn run_once<E: From<KernelError>>(
        &self,
        staged: &Staged<Self>,
        winners: u64,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<CudaTensor, E> {
        let logits = forward(staged)?;
        self.argmax(&logits, winners)?;
        Ok(logits)
    }

    /// Runs a step of `padded` sequences out of the recorded steps' memory, and records it.
    fn run_first<E: From<KernelError>>(
        &self,
        staged: &Staged<Self>,
        padded: usize,
        winners: u64,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<CudaTensor, E> {
        self.memory.record(true);
        self.linear.ahead.list();
        let run = self.run_and_record(staged, winners, forward);
        self.memory.record(false);
        self.linear.ahead.end();
        let (logits, graph) = run?;
        let recording = Recording { driver: self.driver.clone(), graph, logits: logits.clone() };
        self.steps.lock().recordings.insert(padded, recording);
        Ok(logits)
    }

    /// Runs `forward` once for its result, and once more to record what it launches.
    fn run_and_record<E: From<KernelError>>(
        &self,
        staged: &Staged<Self>,
        winners: u64,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<(CudaTensor, sys::CUgraphExec), E> {
        let first = self.run_once(staged, winners, forward)?.borrowed();
        let stream = self.driver.stream()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid and not being captured.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(failed("cuStreamBeginCapture"))?;
        self.linear.ahead.follow();
        let again = self.run_once(staged, winners, forward).map(|logits| logits.borrowed());
        // SAFETY: the capture was begun above.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(failed("cuStreamEndCapture"));
        let (again, graph) = (again?, graph?);
        if again.address() != first.address() {
            let what = "the recorded step does not use the memory of the step before it".into();
            return Err(KernelError::Device { op: "step", what }.into());
        }
        // SAFETY: the graph is valid; its executable copy does not need it.
        let instance = unsafe {
            let instance = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            instance
        };
        let full = self.memory.failed("cuGraphInstantiate", MemoryKind::RecordedSteps, 0);
        Ok((again, instance.map_err(full)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_waste_at_most_an_eighth() {
        assert_eq!([0, 1, 7, 8, 9, 16, 17, 33, 100, 512].map(bucket), [1, 1, 7, 8, 10, 16, 20, 40, 112, 512]);
        for sequences in 9..=512 {
            let padded = bucket(sequences);
            assert!(padded >= sequences && padded <= 512 && (padded - sequences) * 8 <= sequences.next_power_of_two());
            assert_eq!(bucket(padded), padded);
        }
        assert_eq!(buckets(11), [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]);
        assert_eq!(buckets(1 << 20).last(), Some(&512));
    }
}
