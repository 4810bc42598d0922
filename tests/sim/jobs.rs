//! What is known of every job: where it is, when what happened to it. Must not know how that came about.

use std::time::Duration;

use millrace_scheduler::policy::SeqId;

use super::workload::JobSpec;

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Not published yet.
    Unborn,
    /// In the work queue, or with a preprocess actor.
    Queued,
    /// Offered to an engine, the answer is out.
    Offered,
    /// Held by an engine.
    Held(u32, SeqId),
    /// Ended so.
    Ended(End),
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With its answer.
    Done,
    /// Cancelled by its publisher.
    Cancelled,
    /// Past its deadline, or certain to be.
    Expired,
    /// It can never run.
    Refused,
    /// Given up as poison.
    Poison,
}

/// One job's record.
#[derive(Debug, Clone)]
pub struct Record {
    /// Where it is.
    pub place: Place,
    /// When it was published.
    pub published: Duration,
    /// When an engine first accepted it.
    pub accepted: Option<Duration>,
    /// When it first got a slot.
    pub admitted: Option<Duration>,
    /// When its first token came.
    pub first_token: Option<Duration>,
    /// When its last token came.
    pub last_token: Duration,
    /// When its last delta was stored.
    pub last_delta: Duration,
    /// When it ended.
    pub ended: Duration,
    /// Answer tokens shown.
    pub tokens: u32,
    /// Its engine's count of outputs when the last token came.
    pub last_step: u64,
    /// Engines that took it.
    pub attempts: u16,
    /// Wishes to end it.
    pub cancelled: bool,
}

impl Record {
    /// A job nobody has heard of.
    pub const UNBORN: Self = Self {
        place: Place::Unborn,
        published: Duration::ZERO,
        accepted: None,
        admitted: None,
        first_token: None,
        last_token: Duration::ZERO,
        last_delta: Duration::ZERO,
        ended: Duration::ZERO,
        tokens: 0,
        last_step: 0,
        attempts: 0,
        cancelled: false,
    };

    /// Whether it ended.
    pub fn is_over(&self) -> bool {
        matches!(self.place, Place::Ended(_))
    }

    /// Checks a token against what was shown before: no repeat, no gap, no other token.
    ///
    /// # Errors
    /// What is wrong.
    pub fn show(&mut self, job: u32, token: u32, spec: &JobSpec, now: Duration) -> Result<(), String> {
        if self.is_over() {
            return Err(format!("job {job} is given a token behind its end"));
        }
        let place = self.tokens as usize;
        if token != super::ledger::token(job, place) {
            return Err(format!("job {job}: token {place} is {token}: one was lost, repeated or foreign"));
        }
        if self.tokens >= spec.answer {
            return Err(format!("job {job}: token {place} of {}", spec.answer));
        }
        self.tokens += 1;
        self.first_token.get_or_insert(now);
        self.last_token = now;
        Ok(())
    }
}
