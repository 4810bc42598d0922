//! What happens to held jobs: the policy's events become text and ends; writers end. Must not plan.

use std::time::Duration;

use actix::prelude::*;
use millrace_protocol::{ErrorCode, FinishReason, JobError, JobId, Status};

use super::held::Outcome;
use super::{SchedulerActor, Wrote};
use crate::log::{End, Ended};
use crate::policy::{Event, Events};

/// A job whose pages are lost is delivered again after this: its dead node is known to be dead by then.
const PREPARE_AGAIN_AFTER: Duration = Duration::from_secs(1);

impl SchedulerActor {
    /// Carries events out, then hands one delta of each job they concern to its writer.
    pub(super) fn dispatch(&mut self, events: Events, now: Duration) {
        let mut touched = Vec::new();
        for (seq, event) in events {
            let Some(job) = self.by_seq.get(&seq).cloned() else { continue };
            match event {
                Event::Token { token, logprobs } => {
                    self.drawn(&job, now);
                    let held = self.held.get_mut(&job).and_then(|held| held.emitter.as_mut());
                    match held.map(|emitter| emitter.push(token, logprobs)) {
                        Some(Ok(None)) => touched.push(job),
                        Some(Ok(stop @ Some(_))) => {
                            self.end_job(
                                &job,
                                Outcome::Done { reason: FinishReason::Stop, stop, hidden_tokens: 0 },
                                now,
                            );
                        }
                        Some(Err(error)) => self.fail(&job, error.to_string(), now),
                        None => {}
                    }
                }
                Event::Finished { reason, hidden_tokens } => self.finish(&job, reason, hidden_tokens, now),
                Event::Expired => {
                    let error =
                        JobError::new(ErrorCode::DeadlineExceeded, "the deadline passed or cannot be met any more");
                    self.end_job(&job, Outcome::Error(Status::Expired, error), now);
                }
                // Its pages died with the node that prepared it; another one prepares it again.
                Event::Failed(error) if error.code == ErrorCode::PageLost => self.give_back(&job, PREPARE_AGAIN_AFTER),
                Event::Failed(error) => {
                    let status = if error.number < 500 { Status::Rejected } else { Status::Failed };
                    self.end_job(&job, Outcome::Error(status, error), now);
                }
                Event::Refused(error) => self.end_job(&job, Outcome::Error(Status::Rejected, error), now),
                Event::Preempted => self.metrics.preemptions.inc(),
                Event::Admitted { cached_tokens, again } => self.admitted(&job, cached_tokens, again, now),
            }
        }
        for job in touched {
            self.flush(&job);
        }
    }

    fn admitted(&mut self, job: &JobId, cached_tokens: usize, again: bool, now: Duration) {
        let Some(held) = self.held.get_mut(job) else { return };
        held.planned_at.get_or_insert(now);
        self.beacon_due = true;
        if !again {
            held.cached_tokens = cached_tokens.min(held.prompt_tokens);
            self.metrics.queue_secs.observe(held.since_published(now).as_secs_f64());
            self.metrics.prompt.inc_by(held.prompt_tokens as u64);
            self.metrics.cached.inc_by(held.cached_tokens as u64);
        }
    }

    fn drawn(&mut self, job: &JobId, now: Duration) {
        self.metrics.generated.inc();
        let Some(held) = self.held.get_mut(job) else { return };
        match held.last_token_at.replace(now) {
            Some(before) => self.metrics.itl_secs.observe(now.saturating_sub(before).as_secs_f64()),
            None => {
                held.first_token_at = Some(now);
                if held.resumed_tokens == 0 {
                    self.metrics.ttft_secs.observe(held.since_published(now).as_secs_f64());
                }
            }
        }
    }

    /// The policy says that the answer is complete; what was held back is shown, and may complete a stop text.
    fn finish(&mut self, job: &JobId, reason: FinishReason, hidden_tokens: u32, now: Duration) {
        let emitter = self.held.get_mut(job).and_then(|held| held.emitter.as_mut());
        match emitter.map(|emitter| emitter.finish()) {
            Some(Ok(stop)) => {
                let reason = if stop.is_some() { FinishReason::Stop } else { reason };
                self.end_job(job, Outcome::Done { reason, stop, hidden_tokens }, now);
            }
            Some(Err(error)) => self.fail(job, error.to_string(), now),
            None => {}
        }
    }

    fn fail(&mut self, job: &JobId, message: String, now: Duration) {
        let error = JobError::new(ErrorCode::Internal, message);
        self.end_job(job, Outcome::Error(Status::Failed, error), now);
    }

    /// Ends a job once and for all: it leaves the policy, and its final goes to the writer behind its last delta.
    pub(super) fn end_job(&mut self, job: &JobId, outcome: Outcome, now: Duration) {
        self.flush(job);
        let Some(held) = self.held.get_mut(job) else { return };
        if let Some(seq) = held.seq.take() {
            self.planner.remove(seq);
            self.by_seq.remove(&seq);
        }
        let last = held.last_message(outcome, now);
        self.metrics.ended(last.status, last.error.as_ref().map(|error| error.code));
        self.metrics.job_secs.observe(held.since_published(now).as_secs_f64());
        held.log.end(End::Final(Box::new(last)));
        self.beacon_due = true;
    }

    fn flush(&mut self, job: &JobId) {
        let Some(held) = self.held.get_mut(job) else { return };
        if let Some(delta) = held.emitter.as_mut().and_then(|emitter| emitter.take()) {
            held.log.push(delta);
        }
    }

    /// Gives every job back whose answer is not complete, behind what is shown of it.
    pub(super) fn return_all(&mut self) {
        let unfinished = self.held.iter().filter(|(_, held)| held.seq.is_some());
        for job in unfinished.map(|(job, _)| job.clone()).collect::<Vec<_>>() {
            self.give_back(&job, Duration::ZERO);
        }
    }

    /// Returns one job to the queue, behind what is shown of it.
    fn give_back(&mut self, job: &JobId, delay: Duration) {
        self.flush(job);
        let Some(held) = self.held.get_mut(job) else { return };
        if let Some(seq) = held.seq.take() {
            self.planner.remove(seq);
            self.by_seq.remove(&seq);
        }
        held.log.end(End::Return { delay });
    }
}

impl Handler<Wrote> for SchedulerActor {
    type Result = ();

    fn handle(&mut self, Wrote { job, ended }: Wrote, _ctx: &mut Self::Context) {
        match &ended {
            Ended::Stored => tracing::debug!(%job, "job ended"),
            Ended::Returned => tracing::info!(%job, "job returned to the queue"),
            Ended::Stale => {
                self.metrics.stale.inc();
                tracing::info!(%job, "another owner continues the job");
            }
            Ended::Refused(error) => tracing::error!(%job, %error, "the bus refuses the job's output"),
            Ended::Crashed(message) => tracing::error!(%job, %message, "the job's writer panicked"),
        }
        if let Some(seq) = self.held.remove(&job).and_then(|held| held.seq) {
            self.planner.remove(seq);
            self.by_seq.remove(&seq);
        }
        self.beacon_due = true;
        let now = self.now();
        self.pump(now);
    }
}
