//! What a step's output changes: tokens become known, full blocks become findable, answers end. Must not plan.

use std::time::Duration;

use millrace_protocol::step::SlotToken;
use millrace_protocol::{FinishReason, JobError, SlotId};

use super::planner::{Entry, Event, Events, Planner};
use super::sequence::{Phase, SeqId};
use super::shares::DRAWN_WEIGHT;

/// Tokens after which a tenant is charged, so that long answers count while they run.
const CHARGE_EVERY: u64 = 64;

/// An output that contradicts the plan it answers: the session is of no use any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the output contradicts its plan: {0}")]
pub struct Contradiction(pub String);

impl Planner {
    /// Takes the output of the oldest plan that is out. Sequences that have ended or were preempted meanwhile are passed
    /// over: what was drawn for them too late is never seen.
    ///
    /// # Errors
    /// [`Contradiction`] if the output does not answer that plan; nothing more can be planned then.
    pub fn apply(
        &mut self,
        tokens: Vec<SlotToken>,
        failed: Vec<(SlotId, JobError)>,
        busy: Duration,
        events: &mut Events,
    ) -> Result<(), Contradiction> {
        let Some(step) = self.outstanding.pop_front() else {
            return Err(Contradiction("no plan is out".to_owned()));
        };
        self.step_time = Some(self.step_time.map_or(busy, |mean| (mean * 7 + busy) / 8));
        let mut tokens = tokens.into_iter().peekable();
        for entry in step.entries {
            if !self.is_current(&entry) {
                // An executor passes over a slot that failed before; for others it draws a token that came too late.
                tokens.next_if(|token| token.slot == entry.slot);
                continue;
            }
            if let Some((_, error)) = failed.iter().find(|(slot, _)| *slot == entry.slot) {
                self.fail(&entry, error, events);
                continue;
            }
            let drawn = if entry.sample { Some(take_token(&mut tokens, entry.slot)?) } else { None };
            self.advance(&entry, drawn, events);
        }
        match tokens.next() {
            Some(extra) => Err(Contradiction(format!("a token too many, for slot {}", extra.slot.0))),
            None => Ok(()),
        }
    }

    /// Whether the sequence still runs under the admission that this part of a plan was made for.
    fn is_current(&self, entry: &Entry) -> bool {
        self.arena.get(entry.seq).is_some_and(|sequence| sequence.epoch == entry.epoch)
    }

    fn advance(&mut self, entry: &Entry, drawn: Option<SlotToken>, events: &mut Events) {
        let id = entry.seq;
        let Some(sequence) = self.arena.get_mut(id) else { return };
        let Phase::Running(running) = &mut sequence.phase else { return };
        running.confirmed += entry.count;
        running.proven = true;
        sequence.losses = 0;
        let Some(drawn) = drawn else {
            self.register_blocks(id);
            return;
        };
        running.in_flight -= 1;
        sequence.uncharged += DRAWN_WEIGHT;
        if sequence.new.stop_token_ids.contains(&drawn.token) {
            self.register_blocks(id);
            self.remove(id);
            events.push((id, Event::Finished { reason: FinishReason::Stop, hidden_tokens: 1 }));
            return;
        }
        sequence.tokens.push(drawn.token);
        let ended = sequence.answer_left() == 0;
        let (tenant, due) = (sequence.tenant, sequence.uncharged >= CHARGE_EVERY);
        let owed = if due { std::mem::take(&mut sequence.uncharged) } else { 0 };
        if due {
            self.waiting.charge(tenant, owed);
        }
        events.push((id, Event::Token { token: drawn.token, logprobs: drawn.logprobs }));
        self.register_blocks(id);
        if ended {
            self.remove(id);
            events.push((id, Event::Finished { reason: FinishReason::Length, hidden_tokens: 0 }));
        }
    }

    fn fail(&mut self, entry: &Entry, error: &JobError, events: &mut Events) {
        let id = entry.seq;
        let Some(sequence) = self.arena.get(id) else { return };
        // What it computed alone may be as wrong as the result: nobody else is to find it.
        if let (Some(running), Some(engine)) = (sequence.running(), self.engine.as_mut()) {
            for block in &running.table {
                if !engine.pool.is_shared(block) {
                    engine.pool.unregister(block);
                }
            }
        }
        self.remove(id);
        events.push((id, Event::Failed(error.clone())));
    }

    /// Makes blocks findable whose content is computed for certain.
    fn register_blocks(&mut self, id: SeqId) {
        if !self.limits.prefix_cache {
            return;
        }
        let (Some(engine), Some(sequence)) = (self.engine.as_mut(), self.arena.get_mut(id)) else { return };
        let Phase::Running(running) = &mut sequence.phase else { return };
        let full = running.confirmed / engine.block_tokens;
        if full <= running.registered {
            return;
        }
        sequence.chain.extend(&sequence.tokens, &sequence.new.media, engine.block_tokens);
        let fresh = running.table.iter().zip(sequence.chain.hashes()).take(full).skip(running.registered);
        for (block, hash) in fresh {
            engine.pool.register(block, *hash);
        }
        let computed = sequence.chain.hashes().get(running.registered..full).unwrap_or_default();
        engine.under_way.end(id, computed);
        running.registered = full;
    }
}

fn take_token(tokens: &mut impl Iterator<Item = SlotToken>, slot: SlotId) -> Result<SlotToken, Contradiction> {
    match tokens.next() {
        Some(token) if token.slot == slot => Ok(token),
        Some(token) => {
            Err(Contradiction(format!("expected a token for slot {}, got one for {}", slot.0, token.slot.0)))
        }
        None => Err(Contradiction(format!("no token for slot {}", slot.0))),
    }
}
