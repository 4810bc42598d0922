//! Who lives and what they can take: beacons (JSON, so that a person can read them) and attachment.

use serde::{Deserialize, Serialize};

use crate::ids::{ActorId, ModelName};
use crate::prefix::PrefixSummary;

/// Beacons are sent this often and whenever something in them changes, in milliseconds.
pub const BEACON_EVERY_MS: u64 = 250;

/// A peer that was silent for this long counts as dead, in milliseconds.
pub const BEACON_DEAD_AFTER_MS: u64 = 1_500;

/// Fixed properties of an executor's engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineSpec {
    /// Model served.
    pub model: ModelName,
    /// Identity of the weights: part of every prefix-cache key.
    pub weights_hash: String,
    /// KV blocks in the pool.
    pub blocks: u32,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Slots for sequences.
    pub slots: u32,
    /// Most tokens of one step.
    pub step_tokens: u32,
    /// Most vision patches encoded in one step.
    pub step_patches: u32,
    /// Longest sequence of the model, in tokens.
    pub max_tokens: u32,
    /// Rows of the vocabulary.
    pub vocab: u32,
    /// Device in words.
    pub device: String,
}

/// What an engine's work costs. All zero: not measured, and nothing is swapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EngineCosts {
    /// Computing one prompt token in a full step, in nanoseconds.
    pub token_ns: u64,
    /// Copying one KV block (all layers) to host memory, in nanoseconds.
    pub swap_out_ns: u64,
    /// Copying one KV block back, in nanoseconds.
    pub swap_in_ns: u64,
    /// Blocks that host memory holds; 0: the engine does not swap.
    pub host_blocks: u32,
}

/// An executor lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutorBeacon {
    /// Who.
    pub executor: ActorId,
    /// What it can do.
    pub spec: EngineSpec,
    /// The scheduler that holds it.
    pub attached_to: Option<ActorId>,
    /// Steps computed since start.
    pub steps: u64,
}

/// A scheduler lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedulerBeacon {
    /// Who.
    pub scheduler: ActorId,
    /// Model it schedules.
    pub model: ModelName,
    /// Its executor, if it has one.
    pub engine: Option<EngineSpec>,
    /// Further jobs it would accept now.
    pub free_jobs: u32,
    /// Jobs that wait for their first step.
    pub waiting: u32,
    /// Jobs that run.
    pub running: u32,
    /// Free KV blocks.
    pub free_blocks: u32,
    /// Beginnings of prompts that its engine need not compute.
    #[serde(default)]
    pub prefixes: PrefixSummary,
    /// Set while it drains: no new offers.
    pub draining: bool,
}

/// A scheduler takes an executor, or renews its hold (postcard request).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Who takes it.
    pub scheduler: ActorId,
    /// `None` starts a new session (all slots are forgotten); `Some` renews that one.
    pub session: Option<u64>,
    /// Gives the executor back instead.
    pub detach: bool,
}

/// Answer to [`Attach`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AttachReply {
    /// Plans of this session will be run.
    Attached {
        /// Session number, to be repeated in every plan.
        session: u64,
        /// What the engine can do.
        spec: EngineSpec,
        /// What its work costs, as measured when it started.
        costs: EngineCosts,
        /// Last plan of the session that has arrived, 0 before the first: a later one that was sent long ago is lost.
        heard_step: u64,
        /// Last step of the session whose output was sent, 0 before the first.
        answered_step: u64,
    },
    /// Another scheduler holds it.
    Held {
        /// By whom.
        by: ActorId,
    },
    /// The executor no longer knows that session.
    Lost,
    /// Given back.
    Detached,
}
