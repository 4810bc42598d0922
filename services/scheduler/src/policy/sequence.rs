//! One job in the scheduler: what is known of it, what is planned, what it holds. Must not decide anything about others.
//!
//! Planned counts may be ahead of what is known: a token drawn in a step that is still out has a place, but no value yet.

use std::time::Duration;

use millrace_protocol::ready::MediaItem;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{JobId, SlotId};

use super::blocks::Block;
use super::prefix::HashChain;
use super::shares::TenantId;

/// A job as it enters the scheduler.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// Identity, for the executor's logs and page leases.
    pub job: JobId,
    /// Prompt with placeholders expanded.
    pub prompt: Vec<u32>,
    /// Answer tokens that earlier owners have shown.
    pub answer: Vec<u32>,
    /// Media in prompt order.
    pub media: Vec<MediaItem>,
    /// How tokens are drawn.
    pub sampling: ResolvedSampling,
    /// Most answer tokens, those of earlier owners included.
    pub max_tokens: u32,
    /// Tokens that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// Whether a stop text may end the answer, too.
    pub may_stop_on_text: bool,
    /// 0 to 9.
    pub priority: u8,
    /// Whose share it uses.
    pub tenant: String,
    /// Latest useful moment, in the time of `now`.
    pub deadline: Option<Duration>,
}

/// Name of a sequence inside the policy; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId {
    pub(super) index: u32,
    pub(super) unique: u64,
}

/// Order among sequences: the smaller one goes first and is preempted last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// 9 - level: the level is the priority raised by ageing.
    pub depth: u8,
    /// Time of arrival.
    pub arrival: Duration,
    /// Order of arrival.
    pub id: u64,
}

/// Where a sequence is.
#[derive(Debug)]
pub enum Phase {
    /// Waits for admission since the given time.
    Waiting {
        /// When this wait began.
        since: Duration,
    },
    /// Holds a slot of the executor.
    Running(Running),
}

/// What a running sequence holds and has planned.
#[derive(Debug)]
pub struct Running {
    /// Place in the executor.
    pub slot: SlotId,
    /// Block table; full blocks first to last.
    pub table: Vec<Block>,
    /// Tokens whose keys and values are computed once all plans so far have run.
    pub planned: usize,
    /// Tokens whose keys and values are computed for certain: the outputs are back.
    pub confirmed: usize,
    /// Whether a step with it has come back since it was admitted.
    pub proven: bool,
    /// Draws in plans that are still out.
    pub in_flight: usize,
    /// First media item that no plan has touched.
    pub next_media: usize,
    /// Full blocks whose content is registered in the prefix cache.
    pub registered: usize,
}

/// One job and its state.
#[derive(Debug)]
pub struct Sequence {
    /// What was asked.
    pub new: NewSequence,
    /// Prompt and known answer tokens.
    pub tokens: Vec<u32>,
    /// Prompt tokens among them.
    pub prompt_tokens: usize,
    /// Content keys of `tokens`' full blocks.
    pub chain: HashChain,
    /// Where it is.
    pub phase: Phase,
    /// Order among the others.
    pub rank: Rank,
    /// Whose share it uses.
    pub tenant: TenantId,
    /// Counts admissions: outputs of earlier ones are void.
    pub epoch: u32,
    /// Engines lost in a row while this sequence was in its first step.
    pub losses: u32,
    /// Time spent waiting, earlier waits included.
    pub waited: Duration,
    /// Prompt tokens found in the cache at the first admission.
    pub cached_tokens: Option<usize>,
    /// Tokens computed for this sequence that its tenant has not been charged for yet.
    pub uncharged: u64,
    /// Leading blocks of its chain that have a page of host memory promised, while it waits after a preemption.
    pub promised: usize,
}

impl Sequence {
    /// Whether it runs and no step with it has come back yet.
    pub fn is_unproven(&self) -> bool {
        self.running().is_some_and(|running| !running.proven && running.planned > running.confirmed)
    }

    /// Answer tokens that are known.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.prompt_tokens..]
    }

    /// Answer tokens that are still allowed.
    pub fn answer_left(&self) -> usize {
        (self.new.max_tokens as usize).saturating_sub(self.answer().len())
    }

    /// Tokens that have a place: known ones and draws in flight.
    pub fn placed(&self, running: &Running) -> usize {
        self.tokens.len() + running.in_flight
    }

    /// The running part, if it runs.
    pub fn running(&self) -> Option<&Running> {
        match &self.phase {
            Phase::Running(running) => Some(running),
            Phase::Waiting { .. } => None,
        }
    }

    /// Blocks that the tokens known now and one more need.
    pub fn blocks_to_start(&self, block_tokens: usize) -> usize {
        self.tokens.len().div_ceil(block_tokens)
    }

    /// Blocks that the longest possible answer needs: its last token is drawn, but never fed back.
    pub fn blocks_at_most(&self, block_tokens: usize) -> usize {
        let longest = self.prompt_tokens + self.new.max_tokens as usize;
        longest.saturating_sub(1).max(self.tokens.len()).div_ceil(block_tokens)
    }

    /// Steps that at least remain before the answer can be complete.
    pub fn steps_left(&self, to_compute: usize, step_tokens: usize) -> usize {
        let prefill = to_compute.div_ceil(step_tokens.max(1));
        let may_stop = self.new.may_stop_on_text || !self.new.stop_token_ids.is_empty();
        let decode = if may_stop { 0 } else { self.answer_left().saturating_sub(1) };
        prefill + decode
    }
}

/// Patches of one media item, as the vision encoder counts them.
pub fn patches(item: &MediaItem) -> u32 {
    item.grid_h.saturating_mul(item.grid_w)
}
