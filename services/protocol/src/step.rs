//! Executor to scheduler: what a step gave. Binary (postcard).

use serde::{Deserialize, Serialize};

use crate::error::JobError;
use crate::ids::{ActorId, SlotId};
use crate::sampling::TokenLogprobs;

/// Answer to one [`crate::plan::StepPlan`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepOutput {
    /// Who computed.
    pub executor: ActorId,
    /// The plan's session.
    pub session: u64,
    /// The plan's step.
    pub step: u64,
    /// Drawn tokens, in the plan's order of the slots that sample.
    pub tokens: Vec<SlotToken>,
    /// Sequences that failed alone; the others went on. The scheduler releases these slots.
    pub failed: Vec<(SlotId, JobError)>,
    /// Set if the session is of no use any more: a plan was lost or contradicts the executor's state.
    pub broken: Option<String>,
    /// Time the device was busy with the step, in microseconds.
    pub busy_us: u64,
    /// Time the device waited for this plan after the step before, in microseconds.
    pub idle_us: u64,
}

/// One drawn token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlotToken {
    /// The sequence.
    pub slot: SlotId,
    /// The token.
    pub token: u32,
    /// Log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
}
