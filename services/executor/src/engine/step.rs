//! How a plan becomes an output: release, open, fetch and encode media, one ragged forward, draws.

use std::collections::BTreeMap;

use millrace_kernels::Backend;
use millrace_protocol::engine::EngineSpec;
use millrace_protocol::plan::{OpenSlot, StepPlan};
use millrace_protocol::step::{SlotToken, StepOutput};
use millrace_protocol::{ActorId, ErrorCode, JobError, SlotId};

use super::assemble::{Share, assemble};
use super::checks::Limits;
use super::encoder_cache::EncoderCache;
use super::slot::Slot;
use super::swap::HostPages;
use super::{Broken, LoadOptions, MediaSource, RowLogits, StepEngine};
use crate::error::ExecutorError;
use crate::models::Model;
use crate::sampling;

/// A model on a device with its KV pool and slots.
pub struct Engine<B: Backend> {
    pub(super) backend: B,
    pub(super) model: Box<dyn Model<B>>,
    caches: Vec<B::KvCache>,
    host_pages: HostPages,
    pub(super) slots: BTreeMap<u32, Slot<B>>,
    pub(super) encoder_cache: EncoderCache<B>,
    pub(super) spec: EngineSpec,
    pub(super) limits: Limits,
    executor: ActorId,
    keep_logits: bool,
    kept: Vec<RowLogits>,
}

impl<B: Backend> Engine<B> {
    /// An engine without sequences. `weights_hash` is the identity of the model's weights.
    ///
    /// # Errors
    /// Options that do not fit the model, or no room for the KV pool.
    pub fn new(
        backend: B,
        model: Box<dyn Model<B>>,
        weights_hash: String,
        options: &LoadOptions,
    ) -> Result<Self, ExecutorError> {
        let shape = model.spec().clone();
        let blocks = options.blocks(shape.kv_elements)?;
        let caches = model.kv_caches(&backend, blocks as usize, options.block_tokens as usize)?;
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
            device: format!("{:?} {:?}", options.device, options.dtype).to_lowercase(),
        };
        let (block_tokens, step_tokens) = (options.block_tokens as usize, options.step_tokens as usize);
        let limits = Limits { blocks, block_tokens, step_tokens, model: shape };
        let (executor, keep_logits) = (options.executor.clone(), options.keep_logits);
        let encoder_cache = EncoderCache::new(u64::from(options.step_patches));
        let (slots, kept, host_pages) = (BTreeMap::new(), Vec::new(), HostPages::default());
        Ok(Self { backend, model, caches, host_pages, slots, encoder_cache, spec, limits, executor, keep_logits, kept })
    }

    fn run(&mut self, plan: &StepPlan, media: &mut dyn MediaSource, output: &mut StepOutput) -> Result<(), Broken> {
        for slot in &plan.release {
            self.slots.remove(&slot.0).ok_or_else(|| Broken(format!("release of slot {}, not open", slot.0)))?;
        }
        for copy in &plan.copies {
            self.host_pages.copy(&self.backend, &mut self.caches, self.spec.blocks, copy)?;
        }
        for open in &plan.open {
            self.open(open, output)?;
        }
        self.limits.step(&plan.work)?;
        let mut shares = Vec::with_capacity(plan.work.len());
        for work in &plan.work {
            let id = work.slot.0;
            let slot = self.slots.get_mut(&id).ok_or_else(|| Broken(format!("work for slot {id}, not open")))?;
            if slot.failed {
                continue;
            }
            self.limits.in_pool(id, &work.blocks)?;
            slot.blocks.extend(work.blocks.iter().map(|block| block.0));
            self.limits.work(work, slot.computed, slot.tokens.len(), slot.blocks.len())?;
            shares.push(Share { slot: id, count: work.count as usize, sample: work.sample });
        }
        self.encode(&shares, media, output)?;
        shares.retain(|share| self.slots.get(&share.slot).is_some_and(|slot| !slot.failed));
        if shares.is_empty() {
            return Ok(());
        }
        let logits = self.forward(&shares)?;
        self.finish(&shares, logits, output);
        Ok(())
    }

    fn open(&mut self, open: &OpenSlot, output: &mut StepOutput) -> Result<(), Broken> {
        let id = open.slot.0;
        if id >= self.spec.slots || self.slots.contains_key(&id) {
            return Err(Broken(format!("slot {id} of {} cannot be opened: in use or out of range", self.spec.slots)));
        }
        self.limits.open(open)?;
        let fault = self.limits.sequence(open).err();
        let media = if fault.is_some() { &[] } else { open.media.as_slice() };
        self.slots.insert(id, Slot::new(open, self.model.positions(media)));
        if let Some(fault) = fault {
            self.fail(id, fault, output);
        }
        Ok(())
    }

    /// Ends one sequence; the others go on.
    pub(super) fn fail(&mut self, id: u32, error: JobError, output: &mut StepOutput) {
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.failed = true;
            slot.media.clear();
        }
        output.failed.push((SlotId(id), error));
    }

    /// Logits of the rows asked for, on the host, row by row.
    fn forward(&mut self, shares: &[Share]) -> Result<Vec<f32>, Broken> {
        let slots = &self.slots;
        let shares = shares.iter().filter_map(|share| slots.get(&share.slot).map(|slot| (*share, slot)));
        let batch = assemble(&self.backend, shares, self.keep_logits)?;
        let logits = self.model.forward(&self.backend, &batch, &mut self.caches)?;
        Ok(self.backend.to_host(&logits)?)
    }

    /// Draws for the shares that sample, and notes what was computed.
    fn finish(&mut self, shares: &[Share], mut logits: Vec<f32>, output: &mut StepOutput) {
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
            let position = slot.tokens.len().saturating_sub(slot.prompt_tokens) as u64;
            match sampling::draw(row, &slot.sampling, &slot.history, position) {
                Ok(drawn) => {
                    slot.push(drawn.token);
                    let (slot, token, logprobs) = (SlotId(share.slot), drawn.token, drawn.logprobs);
                    output.tokens.push(SlotToken { slot, token, logprobs });
                }
                Err(sampling::NotFinite) => {
                    let what = format!("the logits of answer token {position} are not finite");
                    faults.push((share.slot, JobError::new(ErrorCode::NotFinite, what)));
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
        self.slots.clear();
        self.kept.clear();
    }

    fn step(&mut self, plan: &StepPlan, media: &mut dyn MediaSource) -> StepOutput {
        let mut output = StepOutput {
            executor: self.executor.clone(),
            session: plan.session,
            step: plan.step,
            tokens: Vec::new(),
            failed: Vec::new(),
            broken: None,
            busy_us: 0,
            idle_us: 0,
        };
        self.kept.clear();
        if let Err(Broken(why)) = self.run(plan, media, &mut output) {
            output.tokens.clear();
            output.broken = Some(why);
        }
        output
    }

    fn keep_host_blocks(&mut self, bytes: u64) -> u32 {
        self.host_pages = HostPages::new(&self.backend, &self.caches, bytes);
        self.host_pages.count()
    }

    fn take_logits(&mut self) -> Vec<RowLogits> {
        std::mem::take(&mut self.kept)
    }
}
