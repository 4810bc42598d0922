//! Deadlines: who ends because its moment has passed, or cannot be met any more. Must not plan.

use std::time::Duration;

use super::planner::{Event, Events, Planner};
use super::sequence::{Phase, SeqId};

impl Planner {
    /// Ends sequences whose deadline has passed.
    pub fn expire(&mut self, now: Duration, events: &mut Events) {
        while let Some(&(deadline, id)) = self.deadlines.first() {
            if deadline > now {
                return;
            }
            self.end_late(id, events);
        }
    }

    /// Ends running sequences that cannot make it, and the one whose deadline is next. Who waits is looked at again before
    /// it is admitted, so that nothing walks the queue.
    pub(super) fn expire_hopeless(&mut self, now: Duration, events: &mut Events) {
        if self.deadlines.is_empty() {
            return;
        }
        while let Some(&(_, id)) = self.deadlines.first()
            && self.is_hopeless(id, now)
        {
            self.end_late(id, events);
        }
        let late: Vec<SeqId> = self.running.iter().map(|(_, id)| *id).filter(|id| self.is_hopeless(*id, now)).collect();
        for id in late {
            self.end_late(id, events);
        }
    }

    /// When something happens without outputs or submissions: the next deadline.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    pub(super) fn end_late(&mut self, id: SeqId, events: &mut Events) {
        self.remove(id);
        events.push((id, Event::Expired));
    }

    /// Whether the deadline falls before the earliest end of the answer.
    pub(super) fn is_hopeless(&self, id: SeqId, now: Duration) -> bool {
        let Some(sequence) = self.arena.get(id) else { return false };
        let Some(deadline) = sequence.new.deadline else { return false };
        let (Some(step_time), Some(engine)) = (self.step_time, &self.engine) else { return false };
        let to_compute = match &sequence.phase {
            // A decoding sequence's next token counts among the answer's.
            Phase::Running(running) => sequence.tokens.len().saturating_sub(running.confirmed + 1),
            Phase::Waiting { .. } => sequence.tokens.len(),
        };
        let steps = sequence.steps_left(to_compute, engine.step_tokens);
        // Half the smoothed time: steps may well become faster, and a wrong refusal is worse than a late one.
        let earliest = step_time.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX)) / 2;
        now + earliest > deadline
    }
}
