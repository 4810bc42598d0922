//! Plans for [`super::generate`]: every live sequence decodes or computes its next chunk, in order, within the step budget.

use std::collections::VecDeque;

use millrace_protocol::engine::EngineSpec;
use millrace_protocol::plan::{OpenSlot, SlotWork, StepPlan};
use millrace_protocol::{ActorId, BlockId, JobId, SlotId};

use super::{GenerateError, GenerateOptions, Request};

struct Sequence {
    /// Tokens that are computed together: the prompt's, or all that are known.
    together: u32,
    /// Tokens that are known or being drawn.
    known: u32,
    /// Tokens that are ever computed: the last one of an answer is not.
    most: u32,
    computed: u32,
    blocks: u32,
    live: bool,
}

pub(super) struct Planner {
    step: u64,
    scheduler: Option<ActorId>,
    opens: Vec<OpenSlot>,
    releases: Vec<SlotId>,
    sequences: Vec<Sequence>,
    free: VecDeque<u32>,
    block_tokens: u32,
    step_tokens: u32,
    chunk_tokens: u32,
}

impl Planner {
    pub(super) fn new(
        spec: &EngineSpec,
        requests: &[Request],
        options: &GenerateOptions,
    ) -> Result<Self, GenerateError> {
        let fits = |what, needed: u64, available: u32| match needed <= u64::from(available) {
            true => Ok(()),
            false => Err(GenerateError::DoesNotFit { what, needed, available: u64::from(available) }),
        };
        fits("slots", requests.len() as u64, spec.slots)?;
        let longest = |request: &Request| request.prompt.len() + request.max_tokens.max(request.answer.len());
        let mut blocks = 0;
        for request in requests {
            fits("tokens in one sequence", longest(request) as u64, spec.max_tokens)?;
            blocks += longest(request).div_ceil(spec.block_tokens as usize) as u64;
        }
        let free: VecDeque<u32> = match &options.block_order {
            Some(order) => order.iter().copied().filter(|block| *block < spec.blocks).collect(),
            None => (0..spec.blocks).collect(),
        };
        fits("blocks", blocks, u32::try_from(free.len()).unwrap_or(u32::MAX))?;
        let mut opens = Vec::with_capacity(requests.len());
        for (slot, request) in (0u32..).zip(requests) {
            opens.push(open(slot, request)?);
        }
        let sequences = opens.iter().zip(requests).map(|(open, request)| {
            let (known, last) = (open.tokens.len() as u32, request.max_tokens.saturating_sub(1) as u32);
            let together = if options.decode_answers { open.prompt_tokens } else { known };
            let most = known.max(open.prompt_tokens + last);
            Sequence { together, known, most, computed: 0, blocks: 0, live: true }
        });
        Ok(Self {
            step: 0,
            scheduler: ActorId::new("in-process").ok(),
            sequences: sequences.collect(),
            opens,
            releases: Vec::new(),
            free,
            block_tokens: spec.block_tokens,
            step_tokens: spec.step_tokens,
            chunk_tokens: options.chunk_tokens.unwrap_or(spec.step_tokens).max(1),
        })
    }

    /// The next step; `None` when every sequence has ended.
    pub(super) fn next(&mut self) -> Option<StepPlan> {
        let mut budget = self.step_tokens;
        let mut work = Vec::new();
        for (slot, sequence) in (0u32..).zip(&mut self.sequences).filter(|(_, sequence)| sequence.live) {
            let together = sequence.together.saturating_sub(sequence.computed).max(1);
            let count = (sequence.known - sequence.computed).min(together).min(self.chunk_tokens).min(budget);
            if count == 0 {
                continue;
            }
            budget -= count;
            sequence.computed += count;
            let wanted = sequence.computed.div_ceil(self.block_tokens);
            let grown = wanted.saturating_sub(sequence.blocks).min(u32::try_from(self.free.len()).unwrap_or(u32::MAX));
            let blocks = self.free.drain(..grown as usize).map(BlockId).collect();
            sequence.blocks += grown;
            let sample = sequence.computed == sequence.known;
            // The drawn token is computed next, unless it is the last one that was asked for.
            sequence.known += u32::from(sample && sequence.known < sequence.most);
            work.push(SlotWork { slot: SlotId(slot), count, sample, blocks });
        }
        if work.is_empty() {
            return None;
        }
        self.step += 1;
        Some(StepPlan {
            scheduler: self.scheduler.clone()?,
            session: 1,
            step: self.step,
            release: std::mem::take(&mut self.releases),
            copies: Vec::new(),
            open: std::mem::take(&mut self.opens),
            work,
        })
    }

    /// A sequence ended.
    pub(super) fn end(&mut self, slot: u32) {
        if let Some(sequence) = self.sequences.get_mut(slot as usize).filter(|sequence| sequence.live) {
            sequence.live = false;
            self.releases.push(SlotId(slot));
        }
    }
}

fn open(slot: u32, request: &Request) -> Result<OpenSlot, GenerateError> {
    let job = JobId::new(format!("request-{slot}")).map_err(|error| GenerateError::Broken(error.to_string()))?;
    Ok(OpenSlot {
        slot: SlotId(slot),
        job,
        tokens: [request.prompt.as_slice(), &request.answer].concat(),
        prompt_tokens: request.prompt.len() as u32,
        media: request.media.clone(),
        sampling: request.sampling.clone(),
        cached_tokens: 0,
        blocks: Vec::new(),
    })
}
