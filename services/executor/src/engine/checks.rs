//! Whether a plan fits the engine's state. Two kinds of no: a contradiction breaks the session, since scheduler and executor no
//! longer agree; a bad sequence fails alone.

use std::collections::HashSet;

use millrace_protocol::plan::{OpenSlot, SlotWork};
use millrace_protocol::{BlockId, ErrorCode, JobError};

use super::{Broken, broken};
use crate::models::{ModelSpec, PatchSpec};

/// Limits that plans are checked against.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub blocks: u32,
    pub block_tokens: usize,
    pub step_tokens: usize,
    pub model: ModelSpec,
}

impl Limits {
    /// Whether a slot's table of `blocks` blocks holds `tokens` tokens.
    fn holds(&self, blocks: usize, tokens: usize) -> bool {
        tokens <= blocks * self.block_tokens
    }

    /// Every block is in the pool.
    pub fn in_pool(&self, slot: u32, blocks: &[BlockId]) -> Result<(), Broken> {
        match blocks.iter().find(|block| block.0 >= self.blocks) {
            Some(block) => Err(broken(format!("slot {slot}: block {} of a pool of {}", block.0, self.blocks))),
            None => Ok(()),
        }
    }

    /// Counts of a new slot agree with each other.
    pub fn open(&self, open: &OpenSlot) -> Result<(), Broken> {
        let slot = open.slot.0;
        self.in_pool(slot, &open.blocks)?;
        let (known, cached) = (open.tokens.len(), open.cached_tokens as usize);
        if open.prompt_tokens as usize > known || known == 0 {
            return Err(broken(format!("slot {slot}: {} prompt tokens among {known}", open.prompt_tokens)));
        }
        if cached >= known || !self.holds(open.blocks.len(), cached) {
            let blocks = open.blocks.len();
            return Err(broken(format!("slot {slot}: {cached} cached of {known} tokens in {blocks} blocks")));
        }
        Ok(())
    }

    /// Work agrees with a slot that has computed `computed` of its `known` tokens and owns `blocks` blocks.
    pub fn work(&self, work: &SlotWork, computed: usize, known: usize, blocks: usize) -> Result<(), Broken> {
        let (slot, end) = (work.slot.0, computed + work.count as usize);
        if work.count == 0 || end > known {
            let count = work.count;
            return Err(broken(format!("slot {slot}: {count} tokens after {computed} of {known} known")));
        }
        if work.sample && end != known {
            return Err(broken(format!("slot {slot}: a draw after token {end} of {known} known")));
        }
        if !self.holds(blocks, end) {
            return Err(broken(format!("slot {slot}: {end} tokens in {blocks} blocks of {}", self.block_tokens)));
        }
        Ok(())
    }

    /// The step as a whole: each slot once, within the token budget.
    pub fn step(&self, work: &[SlotWork]) -> Result<(), Broken> {
        let mut seen = HashSet::new();
        if let Some(twice) = work.iter().find(|work| !seen.insert(work.slot)) {
            return Err(broken(format!("slot {} twice in one step", twice.slot.0)));
        }
        let tokens: usize = work.iter().map(|work| work.count as usize).sum();
        if tokens > self.step_tokens {
            return Err(broken(format!("{tokens} tokens in a step of at most {}", self.step_tokens)));
        }
        Ok(())
    }

    /// A sequence that the model can run.
    pub fn sequence(&self, open: &OpenSlot) -> Result<(), JobError> {
        let vocab = self.model.vocab;
        if let Some(id) = open.tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(JobError::new(ErrorCode::TokenRange, format!("token {id} of a vocabulary of {vocab}")));
        }
        if let Some((id, _)) = open.sampling.logit_bias.iter().find(|(id, _)| *id as usize >= vocab) {
            let what = format!("logit_bias for token {id} of a vocabulary of {vocab}");
            return Err(JobError::new(ErrorCode::TokenRange, what));
        }
        match (&self.model.vision, open.media.is_empty()) {
            (_, true) => Ok(()),
            (Some(patches), false) => spans(open, patches),
            (None, false) => Err(JobError::new(ErrorCode::MediaType, "this model takes text alone")),
        }
    }
}

/// Media stand in the prompt in order, each with the placeholders that its grid asks for.
fn spans(open: &OpenSlot, patches: &PatchSpec) -> Result<(), JobError> {
    let mismatch = |what: String| Err(JobError::new(ErrorCode::MediaMismatch, what));
    let mut free = 0u64;
    for (n, item) in open.media.iter().enumerate() {
        let (h, w, merge) = (u64::from(item.grid_h), u64::from(item.grid_w), patches.merge as u64);
        if h == 0
            || w == 0
            || !h.is_multiple_of(merge)
            || !w.is_multiple_of(merge)
            || h * w / (merge * merge) != u64::from(item.tokens)
        {
            return mismatch(format!("item {n}: a grid of {h} x {w} patches for {} placeholders", item.tokens));
        }
        let (start, end) = (u64::from(item.start), u64::from(item.start) + u64::from(item.tokens));
        if start < free || end > u64::from(open.prompt_tokens) {
            return mismatch(format!("item {n}: placeholders {start}..{end} of {} prompt tokens", open.prompt_tokens));
        }
        free = end;
    }
    Ok(())
}
