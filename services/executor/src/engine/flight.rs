//! Steps under way: what each owes, and what becomes of the slots when it has ended. A step is planned, and put on the device,
//! without knowing what the step before it draws: until that one has ended, a slot's last token stands for a draw.

use std::collections::{HashMap, VecDeque};

use millrace_kernels::{Backend, Finished, StepTimes};
use millrace_protocol::plan::StepPlan;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::step::{SlotToken, StepOutput};
use millrace_protocol::{ErrorCode, JobError, SlotId};

use super::slot::Slot;
use super::{Broken, Engine};
use crate::sampling;

/// A token that a step under way draws. The slot may be closed, and opened for another sequence, before it is known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owed {
    pub slot: u32,
    /// Which sequence in this slot.
    pub generation: u64,
    /// Row of the step's draws.
    pub row: usize,
    /// Place among the sequence's tokens.
    pub index: usize,
    /// Place in its answer.
    pub position: u64,
}

/// A step that was launched and not collected.
pub(super) struct Launched<B: Backend> {
    /// What is known of it.
    pub output: StepOutput,
    /// Until it has ended.
    pub flight: Option<B::Flight>,
    pub owed: Vec<Owed>,
    pub times: Option<StepTimes>,
}

impl<B: Backend> Engine<B> {
    /// Waits for `step` to end and gives its draws to the slots; `later` are the steps launched after it.
    pub(super) fn settle(&mut self, step: &mut Launched<B>, later: &mut VecDeque<Launched<B>>) {
        let Some(flight) = step.flight.take() else { return };
        let Finished { drawn, times } = match self.backend.finished(flight) {
            Ok(finished) => finished,
            Err(error) => return self.end_broken(error.into(), step),
        };
        step.times = times;
        for owed in std::mem::take(&mut step.owed) {
            let token = drawn.get(owed.row).copied().flatten();
            let slot = self.slots.get_mut(&owed.slot).filter(|slot| slot.generation == owed.generation);
            if let Some(token) = token {
                step.output.tokens.push(SlotToken { slot: SlotId(owed.slot), token, logprobs: None });
                slot.into_iter().for_each(|slot| slot.learn(owed.index, token));
                continue;
            }
            step.output.failed.push((SlotId(owed.slot), not_finite(owed.position)));
            slot.into_iter().for_each(Slot::fail);
            for step in later.iter_mut() {
                step.owed.retain(|other| (other.slot, other.generation) != (owed.slot, owed.generation));
            }
        }
    }

    /// Settles the steps launched first, until `left` are under way.
    pub(super) fn settle_down_to(&mut self, left: usize) {
        let mut steps = std::mem::take(&mut self.launched);
        let mut settled = VecDeque::new();
        while steps.iter().filter(|step| step.flight.is_some()).count() > left {
            let Some(mut step) = steps.pop_front() else { break };
            self.settle(&mut step, &mut steps);
            settled.push_back(step);
        }
        settled.append(&mut steps);
        self.launched = settled;
    }

    /// Nothing that `step` gave can be used.
    pub(super) fn end_broken(&mut self, Broken { why, device_failed }: Broken, step: &mut Launched<B>) {
        step.output.tokens.clear();
        step.owed.clear();
        if device_failed {
            self.fault = Some(why.clone());
        }
        step.output.broken = Some(why);
    }

    /// Whether some draw of `plan` is the host's, which must know every token before it.
    pub(super) fn draws_on_host(&self, plan: &StepPlan) -> bool {
        let opened: HashMap<u32, &ResolvedSampling> =
            plan.open.iter().map(|open| (open.slot.0, &open.sampling)).collect();
        let by_device = |sampling: &ResolvedSampling| {
            sampling::device_draw(sampling, 0).is_some_and(|draw| self.backend.draws(&[draw]))
        };
        let mut sampling = plan.work.iter().filter(|work| work.sample).filter_map(|work| {
            let known = || self.slots.get(&work.slot.0).map(|slot| &slot.sampling);
            opened.get(&work.slot.0).copied().or_else(known)
        });
        self.keep_logits || sampling.any(|sampling| !by_device(sampling))
    }
}

pub(super) fn not_finite(position: u64) -> JobError {
    JobError::new(ErrorCode::NotFinite, format!("the logits of answer token {position} are not finite"))
}
