//! Scheduler to executor: what one step computes. Binary (postcard), deltas only.
//!
//! A plan needs block tables and counts, never the values of sampled tokens: those stay on the device as
//! the next step's input, so plans can run ahead of outputs. A decoding sequence costs under 40 bytes.

use serde::{Deserialize, Serialize};

use crate::ids::{ActorId, BlockId, JobId, SlotId};
use crate::ready::MediaItem;
use crate::sampling::ResolvedSampling;

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepPlan {
    /// Who plans.
    pub scheduler: ActorId,
    /// Attachment this plan belongs to (from [`crate::engine::AttachReply`]); others are ignored.
    pub session: u64,
    /// Counts up from 1 without gaps within a session.
    pub step: u64,
    /// Slots to forget before the step.
    pub release: Vec<SlotId>,
    /// Blocks to copy between the pool and host memory before the step, in this order.
    pub copies: Vec<BlockCopy>,
    /// Sequences to set up before the step.
    pub open: Vec<OpenSlot>,
    /// What to compute, in the order of the ragged batch.
    pub work: Vec<SlotWork>,
}

/// One block's keys and values move. Pages of host memory are numbered from 0; how many there are is in
/// [`crate::engine::EngineCosts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockCopy {
    /// From the pool to host memory: the block is about to be used for something else.
    Out {
        /// From here.
        block: BlockId,
        /// To here.
        page: u32,
    },
    /// Back to the pool.
    In {
        /// From here.
        page: u32,
        /// To here.
        block: BlockId,
    },
}

/// A sequence enters the executor.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct OpenSlot {
    /// A free slot.
    pub slot: SlotId,
    /// For logs and page leases.
    pub job: JobId,
    /// Prompt, then the answer tokens that are already known (resume, recompute).
    pub tokens: Vec<u32>,
    /// How many of `tokens` are prompt: the answer's token n is drawn with counter n.
    pub prompt_tokens: u32,
    /// Media in prompt order.
    pub media: Vec<MediaItem>,
    /// How tokens are drawn.
    pub sampling: ResolvedSampling,
    /// Leading tokens whose keys and values the first `blocks` already hold.
    pub cached_tokens: u32,
    /// Block table so far (cached prefix).
    pub blocks: Vec<BlockId>,
}

impl std::fmt::Debug for OpenSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenSlot")
            .field("slot", &self.slot)
            .field("job", &self.job)
            .field("tokens", &self.tokens.len())
            .field("media", &self.media.len())
            .field("cached_tokens", &self.cached_tokens)
            .finish_non_exhaustive()
    }
}

/// What one sequence computes in a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotWork {
    /// The sequence.
    pub slot: SlotId,
    /// Tokens to run: the next `count` of the slot's known tokens, or 1 for the token sampled last.
    pub count: u32,
    /// Whether the step's last token of this slot is followed by a draw (the end of a prompt, or a decode).
    pub sample: bool,
    /// Blocks appended to the slot's table before the step.
    pub blocks: Vec<BlockId>,
}
