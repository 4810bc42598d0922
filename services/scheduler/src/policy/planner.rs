//! The scheduler's state and its life cycle: sequences enter, leave, lose their engine. What one step computes is in
//! `step.rs`, who is admitted in `admission.rs`, what outputs change in `outputs.rs`. Pure: no I/O, no clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use millrace_protocol::engine::{EngineCosts, EngineSpec};
use millrace_protocol::plan::{BlockCopy, OpenSlot, SlotWork};
use millrace_protocol::sampling::TokenLogprobs;
use millrace_protocol::{ErrorCode, FinishReason, JobError, SlotId};

use super::arena::Arena;
use super::blocks::BlockPool;
use super::prefix::HashChain;
use super::queue::{WaitingQueue, depth};
use super::sequence::{NewSequence, Phase, Rank, SeqId, Sequence};
use super::sharing::UnderWay;
use super::swap::Swap;

/// What the operator decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Most sequences that run at once.
    pub max_running: usize,
    /// Most tokens of one step.
    pub step_tokens: usize,
    /// Most vision patches of one step; a single item may exceed it alone.
    pub step_patches: u32,
    /// Blocks that admission leaves free, so that running sequences can grow.
    pub watermark_blocks: usize,
    /// Waiting time that raises a sequence by one level; zero: never.
    pub ageing: Duration,
    /// Shares of tenants among equals; who is not named has 1.
    pub tenant_weights: BTreeMap<String, u32>,
    /// Whether blocks are found again by content.
    pub prefix_cache: bool,
    /// Most plans whose outputs are still out.
    pub run_ahead: usize,
    /// Most bytes of an encoded plan.
    pub plan_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_running: 256,
            step_tokens: 2_048,
            step_patches: 16_384,
            watermark_blocks: 4,
            ageing: Duration::from_secs(10),
            tenant_weights: BTreeMap::new(),
            prefix_cache: true,
            run_ahead: 2,
            plan_bytes: usize::MAX,
        }
    }
}

/// What one step computes; the session adds its numbers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// Slots to forget before the step.
    pub release: Vec<SlotId>,
    /// Blocks to copy between the pool and host memory before the step, in this order.
    pub copies: Vec<BlockCopy>,
    /// Sequences to set up before the step.
    pub open: Vec<OpenSlot>,
    /// The ragged batch.
    pub work: Vec<SlotWork>,
}

/// What happened to a sequence. After one of the last four it is gone.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It got a slot, with this many prompt tokens found in the cache.
    Admitted {
        /// Leading tokens that need no computing.
        cached_tokens: usize,
        /// Whether it ran before.
        again: bool,
    },
    /// It lost its slot to others and waits again.
    Preempted,
    /// An answer token was drawn.
    Token {
        /// The token.
        token: u32,
        /// Its log-probabilities, if asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The answer is complete.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Drawn tokens that are counted but not part of the answer (the end-of-text token).
        hidden_tokens: u32,
    },
    /// Its deadline passed, or cannot be met any more.
    Expired,
    /// The executor could not compute it.
    Failed(JobError),
    /// It can never run.
    Refused(JobError),
}

/// Why an engine is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// It died, or contradicted itself.
    Engine,
    /// The connection, or a decision.
    Nobody,
}

/// Engines that may be lost in a sequence's first step before it counts as poison.
const MOST_LOSSES: u32 = 3;

/// Events in the order in which they happened.
pub type Events = Vec<(SeqId, Event)>;

/// The engine as the policy sees it.
#[derive(Debug)]
pub(super) struct Engine {
    pub pool: BlockPool,
    pub block_tokens: usize,
    pub max_tokens: usize,
    pub max_running: usize,
    pub step_tokens: usize,
    pub step_patches: u32,
    pub watermark_blocks: usize,
    pub weights_hash: String,
    pub vocab: u32,
    /// Blocks in host memory.
    pub swap: Swap,
    /// Blocks that are being computed.
    pub under_way: UnderWay,
    /// Free slots, the next one last.
    pub slots: Vec<SlotId>,
    /// Slots the executor still has to forget.
    pub release: Vec<SlotId>,
}

/// A plan that is out.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub entries: Vec<Entry>,
}

/// One sequence's part in a plan that is out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub seq: SeqId,
    pub epoch: u32,
    pub slot: SlotId,
    pub count: usize,
    pub sample: bool,
}

/// Continuous batching over one engine.
#[derive(Debug)]
pub struct Planner {
    pub(super) limits: Limits,
    pub(super) engine: Option<Engine>,
    pub(super) arena: Arena,
    pub(super) waiting: WaitingQueue,
    /// Running sequences in rank order: the last one is preempted first.
    pub(super) running: Vec<(Rank, SeqId)>,
    pub(super) outstanding: VecDeque<Outstanding>,
    pub(super) deadlines: BTreeSet<(Duration, SeqId)>,
    /// Smoothed time of one step, once one was measured.
    pub(super) step_time: Option<Duration>,
    pub(super) preemptions: u64,
}

impl Planner {
    /// A scheduler without an engine.
    pub fn new(limits: Limits) -> Self {
        Self {
            waiting: WaitingQueue::with_weights(limits.ageing, limits.tenant_weights.clone()),
            limits,
            engine: None,
            arena: Arena::default(),
            running: Vec::new(),
            outstanding: VecDeque::new(),
            deadlines: BTreeSet::new(),
            step_time: None,
            preemptions: 0,
        }
    }

    /// Starts on an engine whose slots and blocks are all free. Sequences that can never run on it are refused.
    pub fn attach(&mut self, spec: &EngineSpec, now: Duration, events: &mut Events) {
        self.detach(Blame::Nobody, now, events);
        let step_tokens = self.limits.step_tokens.min(spec.step_tokens as usize).max(1);
        // An eighth of a step is kept for prompts: decodes alone could otherwise fill every step.
        let most_decodes = (step_tokens - step_tokens / 8).max(1);
        self.engine = Some(Engine {
            pool: BlockPool::new(spec.blocks),
            block_tokens: (spec.block_tokens as usize).max(1),
            max_tokens: spec.max_tokens as usize,
            max_running: self.limits.max_running.min(spec.slots as usize).min(most_decodes),
            step_tokens,
            step_patches: self.limits.step_patches.min(spec.step_patches),
            watermark_blocks: self.limits.watermark_blocks,
            weights_hash: spec.weights_hash.clone(),
            vocab: spec.vocab,
            swap: Swap::default(),
            under_way: UnderWay::default(),
            slots: (0..spec.slots).rev().map(SlotId).collect(),
            release: Vec::new(),
        });
        let ids: Vec<SeqId> = self.arena.iter().map(|(id, _)| id).collect();
        for id in ids {
            if let Some(refusal) = self.arena.get(id).and_then(|sequence| self.misfit(sequence)) {
                self.remove(id);
                events.push((id, Event::Refused(refusal)));
                continue;
            }
            self.restart_chain(id);
        }
    }

    /// Takes what the engine's work costs: lets preempted sequences keep their blocks in host memory where that pays.
    pub fn swap_by(&mut self, costs: &EngineCosts) {
        if let Some(engine) = self.engine.as_mut() {
            engine.swap = Swap::new(costs, engine.block_tokens);
        }
    }

    /// The engine is gone: everything that ran waits again, with all tokens that are known. If the engine itself is to
    /// blame, a sequence may have brought it down: one that never got through a step is suspect, and ends as poison the
    /// third time. Suspects are admitted one at a time until they get through a step, so that only the culprit ends.
    pub fn detach(&mut self, blame: Blame, now: Duration, events: &mut Events) {
        let running: Vec<SeqId> = self.running.iter().map(|(_, id)| *id).collect();
        for id in running {
            let suspect = blame == Blame::Engine && self.arena.get(id).is_some_and(Sequence::is_unproven);
            self.back_to_waiting(id, now);
            let Some(sequence) = self.arena.get_mut(id) else { continue };
            sequence.losses += u32::from(suspect);
            if sequence.losses >= MOST_LOSSES {
                let message = format!("{MOST_LOSSES} executors were lost in this job's first step");
                self.remove(id);
                events.push((id, Event::Failed(JobError::new(ErrorCode::Poison, message))));
            }
        }
        self.outstanding.clear();
        self.engine = None;
    }

    /// Takes a sequence in. It may end at once: then the event says how.
    pub fn submit(&mut self, new: NewSequence, now: Duration, events: &mut Events) -> SeqId {
        let tenant = self.waiting.enter(&new.tenant);
        let level = depth(new.priority);
        let deadline = new.deadline;
        let id = self.arena.insert(|id| {
            let mut tokens = new.prompt.clone();
            tokens.extend_from_slice(&new.answer);
            Sequence {
                prompt_tokens: new.prompt.len(),
                tokens,
                chain: HashChain::new("", ""),
                phase: Phase::Waiting { since: now },
                rank: Rank { depth: level, arrival: now, id: id.unique },
                tenant,
                epoch: 0,
                losses: 0,
                waited: Duration::ZERO,
                cached_tokens: None,
                uncharged: 0,
                promised: 0,
                new,
            }
        });
        self.restart_chain(id);
        let Some(sequence) = self.arena.get(id) else { return id };
        self.waiting.push(id, tenant, sequence.rank, now, Duration::ZERO);
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, id));
        }
        let end = match self.misfit(sequence) {
            Some(refusal) => Some(Event::Refused(refusal)),
            None if sequence.answer_left() == 0 => {
                Some(Event::Finished { reason: FinishReason::Length, hidden_tokens: 0 })
            }
            None => None,
        };
        if let Some(end) = end {
            self.remove(id);
            events.push((id, end));
        }
        id
    }

    /// Takes a sequence out at any stage: cancelled, or ended by a stop text. Its slot and blocks are free at once.
    /// `None` if it has ended already.
    pub fn remove(&mut self, id: SeqId) -> Option<Box<Sequence>> {
        self.free_running(id);
        self.waiting.remove(id);
        self.end_promise(id);
        let sequence = self.arena.remove(id)?;
        if let Some(deadline) = sequence.new.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        self.waiting.charge(sequence.tenant, sequence.uncharged);
        self.waiting.leave(sequence.tenant);
        Some(sequence)
    }

    /// A sequence that has not ended.
    pub fn sequence(&self, id: SeqId) -> Option<&Sequence> {
        self.arena.get(id)
    }

    /// Why a sequence can never run on this engine.
    fn misfit(&self, sequence: &Sequence) -> Option<JobError> {
        if sequence.prompt_tokens == 0 {
            return Some(JobError::new(ErrorCode::NoPrompt, "the prompt holds no token; give at least one"));
        }
        let engine = self.engine.as_ref()?;
        let (prompt, wanted) = (sequence.prompt_tokens, sequence.new.max_tokens as usize);
        if prompt + wanted > engine.max_tokens {
            let message = format!(
                "{prompt} prompt tokens and max_tokens {wanted} exceed the model's {} tokens; shorten the prompt or ask for fewer",
                engine.max_tokens
            );
            return Some(JobError::new(ErrorCode::ContextLength, message));
        }
        let (needed, total) = (sequence.blocks_at_most(engine.block_tokens), engine.pool.total());
        if needed > total || engine.max_running == 0 {
            let message = format!(
                "{prompt} prompt tokens and max_tokens {wanted} need {needed} KV blocks of {} tokens, the pool has {total}",
                engine.block_tokens
            );
            return Some(JobError::new(ErrorCode::ContextLength, message));
        }
        self.too_large_to_send(engine, sequence)
    }

    /// Computes a sequence's content keys anew: another engine may have other weights or block sizes.
    fn restart_chain(&mut self, id: SeqId) {
        let (Some(engine), Some(sequence)) = (self.engine.as_ref(), self.arena.get_mut(id)) else { return };
        sequence.promised = 0;
        if self.limits.prefix_cache {
            sequence.chain = HashChain::new(&engine.weights_hash, &sequence.new.tenant);
            sequence.chain.extend(&sequence.tokens, &sequence.new.media, engine.block_tokens);
        }
    }

    /// Frees slot and blocks of a running sequence. `false` if it does not run.
    pub(super) fn free_running(&mut self, id: SeqId) -> bool {
        let Some(sequence) = self.arena.get_mut(id) else { return false };
        let rank = sequence.rank;
        let Phase::Running(running) = &mut sequence.phase else { return false };
        let (slot, mut table) = (running.slot, std::mem::take(&mut running.table));
        let registered = running.registered;
        sequence.epoch += 1;
        if let Ok(place) = self.running.binary_search(&(rank, id)) {
            self.running.remove(place);
        }
        if let Some(engine) = &mut self.engine {
            engine.under_way.end(id, sequence.chain.hashes().get(registered..).unwrap_or_default());
            engine.pool.release_table(&mut table);
            engine.slots.push(slot);
            engine.release.push(slot);
        }
        true
    }

    /// Stops a running sequence and lets it wait for another admission.
    pub(super) fn back_to_waiting(&mut self, id: SeqId, now: Duration) {
        let registered = self.arena.get(id).and_then(Sequence::running).map(|running| running.registered);
        if !self.free_running(id) {
            return;
        }
        if let Some(sequence) = self.arena.get_mut(id) {
            if let (Some(engine), Some(registered)) = (self.engine.as_mut(), registered) {
                let chain = sequence.chain.hashes();
                sequence.promised = engine.swap.promise(&chain[..registered.min(chain.len())]);
            }
            sequence.phase = Phase::Waiting { since: now };
            self.waiting.push(id, sequence.tenant, sequence.rank, now, sequence.waited);
        }
    }

    /// What a sequence had in host memory is not kept for it any longer.
    pub(super) fn end_promise(&mut self, id: SeqId) {
        if let (Some(engine), Some(sequence)) = (self.engine.as_mut(), self.arena.get_mut(id)) {
            let promised = std::mem::take(&mut sequence.promised);
            engine.swap.release(&sequence.chain.hashes()[..promised]);
        }
    }
}
