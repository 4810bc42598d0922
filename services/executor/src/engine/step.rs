//! How a plan becomes an output: release, open, fetch and encode media, one ragged forward, draws.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use millrace_kernels::{Backend, Draw, MemoryReader};
use millrace_protocol::engine::EngineSpec;
use millrace_protocol::plan::{OpenSlot, StepPlan};
use millrace_protocol::step::{SlotToken, StepOutput};
use millrace_protocol::{ActorId, JobError, SlotId};

use super::assemble::{Share, assemble};
use super::checks::Limits;
use super::encoder_cache::{EncoderCache, EncoderCounts};
use super::flight::{Launched, Owed, not_finite};
use super::room::Room;
use super::slot::Slot;
use super::swap::HostPages;
use super::{Broken, Collected, LoadOptions, MediaSource, RowLogits, STEPS_IN_FLIGHT, StepEngine, broken};
use crate::error::ExecutorError;
use crate::models::Model;
use crate::sampling;
use crate::step_batch::StepBatch;

/// A model on a device with its KV pool and slots.
pub struct Engine<B: Backend> {
    pub(super) backend: B,
    pub(super) model: Box<dyn Model<B>>,
    pub(super) caches: Vec<B::KvCache>,
    host_pages: HostPages,
    pub(super) slots: BTreeMap<u32, Slot<B>>,
    pub(super) encoder_cache: EncoderCache<B>,
    pub(super) spec: EngineSpec,
    pub(super) limits: Limits,
    executor: ActorId,
    pub(super) keep_logits: bool,
    kept: Vec<RowLogits>,
    pub(super) fault: Option<String>,
    /// In order of their launch.
    pub(super) launched: VecDeque<Launched<B>>,
    /// Sequences opened so far.
    opened: u64,
}

impl<B: Backend> Engine<B> {
    /// An engine without sequences. `weights_hash` is the identity of the model's weights.
    ///
    /// # Errors
    /// Options that do not fit the model, or no room for the KV pool.
    pub fn new(
        backend: B,
        mut model: Box<dyn Model<B>>,
        weights_hash: String,
        options: &LoadOptions,
    ) -> Result<Self, ExecutorError> {
        let shape = model.spec().clone();
        let (blocks, caches) = Room::after_loading(&backend, options)?.pool(&backend, model.as_mut(), options)?;
        let spec = EngineSpec {
            model: options.model.clone(),
            weights_hash,
            blocks,
            block_tokens: options.block_tokens,
            slots: options.slots,
            step_tokens: options.step_tokens,
            step_patches: options.step_patches,
            max_tokens: u32::try_from(shape.max_tokens).unwrap_or(u32::MAX),
            vocab: u32::try_from(shape.vocab).unwrap_or(u32::MAX),
            device: format!("{} {:?}", options.device, options.dtype).to_lowercase(),
        };
        let (block_tokens, step_tokens) = (options.block_tokens as usize, options.step_tokens as usize);
        let encoder_cache = EncoderCache::new(&backend, options, shape.vision.is_some());
        let limits = Limits { blocks, block_tokens, step_tokens, model: shape };
        let (executor, keep_logits) = (options.executor.clone(), options.keep_logits);
        let (slots, kept, fault, host_pages) = (BTreeMap::new(), Vec::new(), None, HostPages::default());
        let mut engine = Self {
            backend,
            model,
            caches,
            host_pages,
            slots,
            encoder_cache,
            spec,
            limits,
            executor,
            keep_logits,
            kept,
            fault,
            launched: VecDeque::new(),
            opened: 0,
        };
        engine.warm_up()?;
        Ok(engine)
    }

    /// Launches a step.
    fn start(&mut self, plan: &StepPlan, media: &mut dyn MediaSource) -> Launched<B> {
        let output = StepOutput {
            executor: self.executor.clone(),
            session: plan.session,
            step: plan.step,
            tokens: Vec::new(),
            failed: Vec::new(),
            broken: None,
            busy_us: 0,
            idle_us: 0,
        };
        let mut step = Launched { output, flight: None, owed: Vec::new(), times: None };
        self.kept.clear();
        // A token that is still to come is one of the step launched last: its draws alone are where the device looks.
        self.settle_down_to(if self.must_wait(plan) { 0 } else { STEPS_IN_FLIGHT - 1 });
        if let Err(broken) = self.run(plan, media, &mut step) {
            self.end_broken(broken, &mut step);
        }
        step
    }

    fn run(&mut self, plan: &StepPlan, media: &mut dyn MediaSource, step: &mut Launched<B>) -> Result<(), Broken> {
        for slot in &plan.release {
            self.slots.remove(&slot.0).ok_or_else(|| broken(format!("release of slot {}, not open", slot.0)))?;
        }
        if !plan.copies.is_empty() {
            self.backend.begin()?;
        }
        for copy in &plan.copies {
            self.host_pages.copy(&self.backend, &mut self.caches, self.spec.blocks, copy)?;
        }
        for open in &plan.open {
            self.open(open, &mut step.output)?;
        }
        self.limits.step(&plan.work)?;
        let mut shares = Vec::with_capacity(plan.work.len());
        for work in &plan.work {
            let id = work.slot.0;
            let slot = self.slots.get_mut(&id).ok_or_else(|| broken(format!("work for slot {id}, not open")))?;
            if slot.failed {
                continue;
            }
            self.limits.in_pool(id, &work.blocks)?;
            slot.blocks.extend(work.blocks.iter().map(|block| block.0));
            self.limits.work(work, slot.computed, slot.tokens.len(), slot.blocks.len())?;
            shares.push(Share { slot: id, count: work.count as usize, sample: work.sample });
        }
        self.encode(&shares, media, &mut step.output)?;
        shares.retain(|share| self.slots.get(&share.slot).is_some_and(|slot| !slot.failed));
        if shares.is_empty() {
            step.flight = Some(self.backend.finish(None)?);
            return Ok(());
        }
        self.forward(&shares, step)
    }

    fn open(&mut self, open: &OpenSlot, output: &mut StepOutput) -> Result<(), Broken> {
        let id = open.slot.0;
        if id >= self.spec.slots || self.slots.contains_key(&id) {
            return Err(broken(format!("slot {id} of {} cannot be opened: in use or out of range", self.spec.slots)));
        }
        self.limits.open(open)?;
        let fault = self.limits.sequence(open).err();
        let media = if fault.is_some() { &[] } else { open.media.as_slice() };
        self.opened += 1;
        self.slots.insert(id, Slot::new(open, self.model.positions(media), self.opened));
        if let Some(fault) = fault {
            self.fail(id, fault, output);
        }
        Ok(())
    }

    /// Ends one sequence; the others go on.
    pub(super) fn fail(&mut self, id: u32, error: JobError, output: &mut StepOutput) {
        self.slots.get_mut(&id).into_iter().for_each(Slot::fail);
        output.failed.push((SlotId(id), error));
    }

    /// Launches the model: the device draws if it can make all draws, else the host does, which waits for the logits.
    fn forward(&mut self, shares: &[Share], step: &mut Launched<B>) -> Result<(), Broken> {
        let Self { backend, model, caches, slots, limits, keep_logits, .. } = self;
        let owned = || shares.iter().filter_map(|share| slots.get(&share.slot).map(|slot| (*share, slot)));
        let (inputs, vision) =
            assemble(backend, owned(), limits.block_tokens, *keep_logits, limits.model.single_rows_differ)?;
        let vision = vision.as_ref();
        let logits =
            backend.step(inputs, &mut |staged| model.forward(backend, &StepBatch { staged, vision }, caches))?;
        let sampling = owned().filter(|(share, _)| share.sample);
        let draws = sampling.map(|(_, slot)| sampling::device_draw(&slot.sampling, slot.answer_position()));
        let draws: Option<Vec<Draw>> = if *keep_logits { None } else { draws.collect() };
        if let Some(draws) = draws.filter(|draws| backend.draws(draws)) {
            let drawn = (!draws.is_empty()).then_some((&logits, draws.as_slice()));
            step.flight = Some(backend.finish(drawn)?);
            self.owe(shares, step);
            return Ok(());
        }
        let values = backend.logits_to_host(&logits)?;
        step.times = backend.finished(backend.finish(None)?)?.times;
        self.draw(shares, values, &mut step.output);
        Ok(())
    }

    /// Notes what is being computed, and the draws that are to come.
    fn owe(&mut self, shares: &[Share], step: &mut Launched<B>) {
        for share in shares {
            let Some(slot) = self.slots.get_mut(&share.slot) else { continue };
            slot.advance(share.count);
            if share.sample {
                let (row, position, generation) = (step.owed.len(), slot.answer_position(), slot.generation);
                step.owed.push(Owed { slot: share.slot, generation, row, index: slot.push_owed(row), position });
            }
        }
    }

    /// Draws on the host from the logits of the rows asked for.
    fn draw(&mut self, shares: &[Share], mut logits: Vec<f32>, output: &mut StepOutput) {
        let mut rows = logits.chunks_mut(self.limits.model.vocab.max(1));
        let mut faults = Vec::new();
        for share in shares {
            let Some(slot) = self.slots.get_mut(&share.slot) else { continue };
            let wanted = if self.keep_logits { share.count } else { usize::from(share.sample) };
            let mut last = None;
            for (index, row) in (slot.computed..).zip(rows.by_ref().take(wanted)) {
                if self.keep_logits {
                    self.kept.push(RowLogits { slot: share.slot, index, logits: row.to_vec() });
                }
                last = Some(row);
            }
            slot.advance(share.count);
            let (Some(row), true) = (last, share.sample) else { continue };
            let position = slot.answer_position();
            match sampling::draw(row, &slot.sampling, &slot.history, position) {
                Ok(drawn) => {
                    slot.push(drawn.token);
                    let (slot, token, logprobs) = (SlotId(share.slot), drawn.token, drawn.logprobs);
                    output.tokens.push(SlotToken { slot, token, logprobs });
                }
                Err(sampling::NotFinite) => {
                    faults.push((share.slot, not_finite(position)));
                }
            }
        }
        for (slot, fault) in faults {
            self.fail(slot, fault, output);
        }
    }
}

impl<B: Backend> StepEngine for Engine<B> {
    fn spec(&self) -> EngineSpec {
        self.spec.clone()
    }

    fn reset(&mut self) {
        self.settle_down_to(0);
        self.launched.clear();
        self.slots.clear();
        self.kept.clear();
    }

    fn launch(&mut self, plan: &StepPlan, media: &mut dyn MediaSource) {
        let step = self.start(plan, media);
        self.launched.push_back(step);
    }

    fn must_wait(&self, plan: &StepPlan) -> bool {
        self.launched.iter().any(|step| step.flight.is_some()) && self.draws_on_host(plan)
    }

    fn has_ended(&self) -> bool {
        let flight = self.launched.front().and_then(|step| step.flight.as_ref());
        // A failure shows when the step is collected.
        flight.is_none_or(|flight| self.backend.has_finished(flight).unwrap_or(true))
    }

    fn collect(&mut self) -> Option<Collected> {
        let mut later = std::mem::take(&mut self.launched);
        let mut step = later.pop_front()?;
        self.settle(&mut step, &mut later);
        self.launched = later;
        Some(Collected { output: step.output, times: step.times })
    }

    fn step(&mut self, plan: &StepPlan, media: &mut dyn MediaSource) -> StepOutput {
        let mut step = self.start(plan, media);
        self.settle(&mut step, &mut VecDeque::new());
        step.output
    }

    fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    fn memory_reader(&self) -> Option<MemoryReader> {
        self.backend.memory_reader()
    }

    fn encoder_counts(&self) -> Option<Arc<EncoderCounts>> {
        self.limits.model.vision.map(|_| self.encoder_cache.counts())
    }

    fn keep_host_blocks(&mut self, bytes: u64) -> u32 {
        self.host_pages = HostPages::new(&self.backend, &self.caches, bytes);
        self.host_pages.count()
    }

    fn wait(&self) {
        if let Err(error) = self.backend.wait() {
            tracing::warn!(%error, "waiting for the device");
        }
    }

    fn take_logits(&mut self) -> Vec<RowLogits> {
        std::mem::take(&mut self.kept)
    }
}
