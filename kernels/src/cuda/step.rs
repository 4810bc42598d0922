//! Running a step: staging, and recording of decode steps as CUDA graphs.
//!
//! A step in which every sequence has one row is recorded for its batch size and table width, both rounded up, the first time
//! it comes (it runs unrecorded then, so that every kernel is loaded), and replayed with other inputs after that.

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
/// Narrowest block table of a recorded step: tables grow by doubling from here.
const NARROWEST_TABLE: usize = 64;
/// Buffers that every step uses hold 512 sequences of 32k tokens at once, so that they do not grow in a steady state.
const LEAST_KEPT_BYTES: usize = 4 << 20;
/// Recorded steps that are kept.
const MOST_RECORDINGS: usize = 256;

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

/// Draws that there is room for from the start.
const USUAL_DRAWS: usize = 1 << 14;

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
    /// What it reads its inputs from.
    staging: Owned,
    logits: CudaTensor,
    /// When it was last replayed.
    used: u64,
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
    /// Device buffer of steps that are not recorded.
    staging: Option<(Owned, usize)>,
    /// Draws of the last step: its address is in every recording. One is enough for steps that run ahead of the host, since the
    /// stream copies them to the host and the next step reads them before it draws.
    winners: Option<(Owned, usize)>,
    /// Rows that the last step drew for.
    drawn: usize,
    recordings: HashMap<Sizes, Recording>,
    count: u64,
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
    /// Copies `inputs`, laid out by `sizes`, to `device`.
    fn copy(
        &mut self,
        backend: &CudaBackend,
        sizes: Sizes,
        inputs: &StepInputs,
        device: u64,
    ) -> Result<(), KernelError> {
        let bytes = 4 * sizes.words();
        // The buffer used longer ago: the step that runs now has read it.
        self.host.swap(0, 1);
        let [_, host] = &mut self.host;
        if host.as_ref().is_none_or(|host| host.bytes() < bytes) {
            *host = Some(Pinned::new(&backend.driver, bytes.next_power_of_two())?);
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
        host.send(device, bytes)
    }

    /// Where `rows` draws go. If they have to go elsewhere than those before, nothing recorded is of use.
    fn winners(&mut self, backend: &CudaBackend, rows: usize) -> Result<u64, KernelError> {
        if self.winners.as_ref().is_none_or(|(_, own)| *own < 4 * rows) {
            let size = 4 * rows.max(USUAL_DRAWS).next_power_of_two();
            let memory = backend.memory.allocate(MemoryKind::Scratch, size)?;
            if let Some((before, bytes)) = &self.winners {
                backend.copy(before.pointer, memory.pointer, *bytes)?;
                self.recordings.clear();
                backend.driver.synchronize()?;
            }
            self.winners = Some((memory, size));
        }
        Ok(self.winners.as_ref().map_or(0, |(memory, _)| memory.pointer))
    }

    /// A device buffer of `bytes`, kept from step to step.
    fn keep(slot: &mut Option<(Owned, usize)>, backend: &CudaBackend, bytes: usize) -> Result<u64, KernelError> {
        if slot.as_ref().is_none_or(|(_, own)| *own < bytes) {
            let size = bytes.next_power_of_two().max(LEAST_KEPT_BYTES);
            backend.driver.synchronize()?;
            *slot = Some((backend.memory.allocate(MemoryKind::Scratch, size)?, size));
        }
        Ok(slot.as_ref().map_or(0, |(memory, _)| memory.pointer))
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
        if !self.graphs || !inputs.replayable || sequences == 0 || sequences > MOST_RECORDED {
            return self.run_plain(inputs, exact, forward);
        }
        let padded = bucket(sequences);
        let stride = exact.stride.next_power_of_two().max(NARROWEST_TABLE);
        let sizes = Sizes { rows: padded, sequences: padded, logit_rows: padded, tail: 0, stride };
        let mut state = self.steps.lock();
        state.count += 1;
        let now = state.count;
        let known = state.recordings.get_mut(&sizes).map(|recording| {
            recording.used = now;
            (recording.staging.pointer, recording.graph, recording.logits.clone())
        });
        let Some((staging, graph, logits)) = known else {
            drop(state);
            return self.run_first(inputs, sizes, forward);
        };
        state.copy(self, sizes, &inputs, staging)?;
        let winners = state.winners.as_ref().map_or(0, |(memory, _)| memory.pointer);
        let stream = self.driver.stream()?;
        // SAFETY: graph and stream are valid, and everything the graph touches is kept.
        unsafe { result::graph::launch(graph, stream) }.map_err(failed("cuGraphLaunch"))?;
        Ok(CudaLogits { logits, winners, rows: sequences })
    }

    /// `inputs` as staged at `address`, draws of the step before at `winners`.
    fn stage(&self, sizes: Sizes, inputs: &StepInputs, address: u64, winners: u64) -> Staged<Self> {
        let staged = sizes.parts_at(address, inputs);
        Staged { ids: staged.ids.with_draws(winners), ..staged }
    }

    fn run_plain<E: From<KernelError>>(
        &self,
        inputs: StepInputs,
        sizes: Sizes,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<CudaLogits, E> {
        let (address, winners) = {
            let state = &mut *self.steps.lock();
            let address = State::keep(&mut state.staging, self, 4 * sizes.words())?;
            state.copy(self, sizes, &inputs, address)?;
            (address, state.winners(self, sizes.logit_rows)?)
        };
        let logits = forward(&self.stage(sizes, &inputs, address, winners))?;
        self.argmax(&logits, winners)?;
        Ok(CudaLogits { logits, winners, rows: inputs.logit_rows.len() })
    }

    /// Runs a step out of the recorded steps' memory, and records it.
    fn run_first<E: From<KernelError>>(
        &self,
        inputs: StepInputs,
        sizes: Sizes,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<CudaLogits, E> {
        let staging = self.memory.allocate(MemoryKind::RecordedSteps, 4 * sizes.words())?;
        let winners = {
            let state = &mut *self.steps.lock();
            state.copy(self, sizes, &inputs, staging.pointer)?;
            state.winners(self, sizes.logit_rows)?
        };
        let staged = self.stage(sizes, &inputs, staging.pointer, winners);
        self.memory.record(true);
        let run = self.run_and_record(&staged, winners, forward);
        self.memory.record(false);
        let (logits, graph) = run?;
        let state = &mut *self.steps.lock();
        if state.recordings.len() >= MOST_RECORDINGS {
            let oldest = state.recordings.iter().min_by_key(|(_, recording)| recording.used).map(|(sizes, _)| *sizes);
            oldest.map(|sizes| state.recordings.remove(&sizes));
        }
        let (driver, kept, used) = (self.driver.clone(), logits.clone(), state.count);
        state.recordings.insert(sizes, Recording { driver, graph, staging, logits: kept, used });
        Ok(CudaLogits { logits, winners, rows: inputs.logit_rows.len() })
    }

    /// Runs `forward` once for its result, and once more to record what it launches.
    fn run_and_record<E: From<KernelError>>(
        &self,
        staged: &Staged<Self>,
        winners: u64,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<(CudaTensor, sys::CUgraphExec), E> {
        let first = {
            let logits = forward(staged)?;
            self.argmax(&logits, winners)?;
            logits.borrowed()
        };
        let stream = self.driver.stream()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid and not being captured.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(failed("cuStreamBeginCapture"))?;
        let again = forward(staged).and_then(|logits| {
            self.argmax(&logits, winners)?;
            Ok(logits.borrowed())
        });
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
