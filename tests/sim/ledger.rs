//! The executor's own books: what is open, who holds which block, how far each sequence is. Every plan is checked against
//! them, at a cost that does not depend on the pool's size. Must not ask the policy.

use std::collections::HashMap;

use millrace_protocol::SlotId;
use millrace_protocol::engine::EngineSpec;
use millrace_protocol::step::SlotToken;
use millrace_scheduler::policy::Plan;

use super::cost::Load;

/// The token that ends an answer.
pub const END_TOKEN: u32 = 1;

#[derive(Debug)]
struct Slot {
    job: u32,
    known: usize,
    prompt: usize,
    position: usize,
    table: Vec<u32>,
    /// Place of the answer's end-of-text token, if it has one.
    ends_at: Option<usize>,
}

/// Books of one engine.
#[derive(Debug)]
pub struct Ledger {
    slots: HashMap<SlotId, Slot>,
    references: Vec<u16>,
    held_blocks: usize,
    block_tokens: usize,
    step_tokens: usize,
    most_slots: usize,
}

/// What a plan makes the executor do.
#[derive(Debug)]
pub struct Step {
    /// For its time.
    pub load: Load,
    /// What it draws.
    pub drawn: Vec<SlotToken>,
    /// Tokens computed.
    pub tokens: usize,
}

impl Ledger {
    /// Books of an engine on which nothing is open.
    pub fn new(spec: &EngineSpec, step_tokens: usize, max_running: usize) -> Self {
        Self {
            slots: HashMap::new(),
            references: vec![0; spec.blocks as usize],
            held_blocks: 0,
            block_tokens: spec.block_tokens as usize,
            step_tokens: step_tokens.min(spec.step_tokens as usize),
            most_slots: max_running.min(spec.slots as usize),
        }
    }

    /// Sequences open, and blocks that they hold.
    pub fn held(&self) -> (usize, usize) {
        (self.slots.len(), self.held_blocks)
    }

    /// Books a plan. `ends_at` gives the job's number and where its answer ends.
    ///
    /// # Errors
    /// What the plan contradicts.
    pub fn book(&mut self, plan: &Plan, ends_at: impl Fn(&str) -> (u32, Option<usize>)) -> Result<Step, String> {
        for slot in &plan.release {
            let closed = self.slots.remove(slot).ok_or_else(|| format!("{slot:?} is released but not open"))?;
            for block in closed.table {
                self.give_back(block);
            }
        }
        for open in &plan.open {
            let (job, ends_at) = ends_at(open.job.as_str());
            let table: Vec<u32> = open.blocks.iter().map(|block| block.0).collect();
            if table.len() * self.block_tokens != open.cached_tokens as usize {
                return Err(format!("{} opens with {} blocks for {}", open.job, table.len(), open.cached_tokens));
            }
            for block in &table {
                self.hold(*block, true)?;
            }
            let (known, position) = (open.tokens.len(), open.cached_tokens as usize);
            let slot = Slot { job, known, prompt: open.prompt_tokens as usize, position, table, ends_at };
            if self.slots.insert(open.slot, slot).is_some() {
                return Err(format!("{:?} is opened twice", open.slot));
            }
        }
        if self.slots.len() > self.most_slots {
            return Err(format!("{} sequences run, {} may", self.slots.len(), self.most_slots));
        }
        self.work(plan)
    }

    fn work(&mut self, plan: &Plan) -> Result<Step, String> {
        let mut step = Step { load: Load::default(), drawn: Vec::with_capacity(plan.work.len()), tokens: 0 };
        let mut seen = vec![false; self.slots.len() + self.most_slots + 1];
        for work in &plan.work {
            for block in &work.blocks {
                self.hold(block.0, false)?;
            }
            let slot = self.slots.get_mut(&work.slot).ok_or_else(|| format!("{:?} is not open", work.slot))?;
            slot.table.extend(work.blocks.iter().map(|block| block.0));
            if seen.get_mut(work.slot.0 as usize).is_some_and(|seen| std::mem::replace(seen, true)) {
                return Err(format!("{:?} works twice in a step", work.slot));
            }
            let (count, end) = (work.count as usize, slot.position + work.count as usize);
            if count == 0 || end > slot.known || end.div_ceil(self.block_tokens) > slot.table.len() {
                return Err(format!("job {} computes {count} tokens at {}", slot.job, slot.position));
            }
            // A sequence that may draw no further token is still allowed to be computed to its end.
            if work.sample && end != slot.known {
                return Err(format!("job {} draws before its tokens are computed", slot.job));
            }
            if count == 1 && slot.position >= slot.prompt {
                step.load.decodes += 1;
                step.load.context_tokens += slot.position as u64;
            } else {
                step.load.prefill_tokens += count as u64;
            }
            slot.position = end;
            step.tokens += count;
            if work.sample {
                let place = slot.known - slot.prompt;
                slot.known += 1;
                let token = if slot.ends_at == Some(place) { END_TOKEN } else { token(slot.job, place) };
                step.drawn.push(SlotToken { slot: work.slot, token, logprobs: None });
            }
        }
        match step.tokens {
            0 => Err("an empty step".to_owned()),
            tokens if tokens > self.step_tokens => Err(format!("{tokens} tokens in a step of {}", self.step_tokens)),
            _ => Ok(step),
        }
    }

    fn hold(&mut self, block: u32, may_be_shared: bool) -> Result<(), String> {
        let count = self.references.get_mut(block as usize).ok_or_else(|| format!("block {block} does not exist"))?;
        if *count > 0 && !may_be_shared {
            return Err(format!("block {block} is given to a second sequence to write"));
        }
        *count += 1;
        self.held_blocks += usize::from(*count == 1);
        Ok(())
    }

    fn give_back(&mut self, block: u32) {
        if let Some(count) = self.references.get_mut(block as usize) {
            *count -= 1;
            self.held_blocks -= usize::from(*count == 0);
        }
    }
}

/// Token `place` of a job's answer: the same in every run and after every resume.
pub fn token(job: u32, place: usize) -> u32 {
    10 + (job.wrapping_mul(31).wrapping_add(place as u32)) % 50_000
}

#[cfg(test)]
mod tests {
    use millrace_protocol::plan::{OpenSlot, SlotWork};
    use millrace_protocol::sampling::ResolvedSampling;
    use millrace_protocol::{BlockId, JobId};

    use super::*;
    use crate::sim::engine::h200_spec;

    fn ledger() -> Ledger {
        Ledger::new(&h200_spec(8, 2, 32).unwrap(), 32, 2)
    }

    fn open(slot: u32, tokens: usize) -> OpenSlot {
        OpenSlot {
            slot: SlotId(slot),
            job: JobId::new(slot.to_string()).unwrap(),
            tokens: vec![5; tokens],
            prompt_tokens: tokens as u32,
            media: vec![],
            sampling: ResolvedSampling::greedy(),
            cached_tokens: 0,
            blocks: vec![],
        }
    }

    fn work(slot: u32, count: u32, sample: bool, blocks: &[u32]) -> SlotWork {
        let blocks = blocks.iter().copied().map(BlockId).collect();
        SlotWork { slot: SlotId(slot), count, sample, blocks }
    }

    fn book(ledger: &mut Ledger, release: &[u32], open: Vec<OpenSlot>, work: Vec<SlotWork>) -> Result<Step, String> {
        let release = release.iter().copied().map(SlotId).collect();
        ledger.book(&Plan { release, copies: Vec::new(), open, work }, |name| (name.parse().unwrap(), None))
    }

    #[test]
    fn a_lawful_plan_is_booked() {
        let mut ledger = ledger();
        let step = book(&mut ledger, &[], vec![open(0, 20)], vec![work(0, 20, true, &[3, 4])]).unwrap();
        assert_eq!((step.tokens, step.load.prefill_tokens, step.drawn.len()), (20, 20, 1));
        let step = book(&mut ledger, &[], vec![], vec![work(0, 1, true, &[])]).unwrap();
        assert_eq!((step.load.decodes, step.load.context_tokens), (1, 20));
        assert_eq!(ledger.held(), (1, 2));
        book(&mut ledger, &[0], vec![open(0, 4)], vec![work(0, 4, true, &[3])]).unwrap();
        assert_eq!(ledger.held(), (1, 1));
    }

    #[test]
    fn every_unlawful_plan_is_refused() {
        let cases: [(&str, Vec<OpenSlot>, Vec<SlotWork>); 8] = [
            ("tokens in a step", vec![open(1, 40)], vec![work(1, 33, false, &[1, 2, 5])]),
            ("second sequence", vec![open(1, 4)], vec![work(1, 4, true, &[3])]),
            ("does not exist", vec![open(1, 4)], vec![work(1, 4, true, &[8])]),
            ("opened twice", vec![open(0, 4)], vec![work(0, 4, true, &[5])]),
            ("is not open", vec![], vec![work(1, 1, true, &[])]),
            ("computes", vec![open(1, 20)], vec![work(1, 20, true, &[5])]),
            ("draws before", vec![open(1, 20)], vec![work(1, 10, true, &[5])]),
            ("works twice", vec![], vec![work(0, 1, true, &[]), work(0, 1, true, &[])]),
        ];
        for (what, open_slots, works) in cases {
            let mut ledger = ledger();
            book(&mut ledger, &[], vec![open(0, 20)], vec![work(0, 20, true, &[3, 4])]).unwrap();
            let refusal = book(&mut ledger, &[], open_slots, works).unwrap_err();
            assert!(refusal.contains(what), "{refusal:?} is not about {what:?}");
        }
        assert!(book(&mut ledger(), &[0], vec![], vec![]).unwrap_err().contains("not open"));
        assert!(book(&mut ledger(), &[], vec![], vec![]).unwrap_err().contains("empty"));
        let many = (0..3).map(|slot| open(slot, 4)).collect();
        assert!(book(&mut ledger(), &[], many, vec![]).unwrap_err().contains("run"));
    }
}
