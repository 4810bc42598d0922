//! How jobs come in and are cancelled: offers, redeliveries, tombstones. Must not plan.

use std::collections::hash_map::Entry;
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use millrace_bus::{Incoming, published_unix_ms};
use millrace_protocol::ready::{Offer, OfferReply, ReadyJob, Shown};
use millrace_protocol::{Class, ErrorCode, FinishReason, JobError, JobId, Status};
use tokio_util::task::AbortOnDropHandle;

use super::held::{Held, Outcome};
use super::{SchedulerActor, Wrote, guarded};
use crate::emit::Emitter;
use crate::log::{JobLog, Origin, Writer};
use crate::policy::{Events, NewSequence};

impl SchedulerActor {
    /// Jobs that would be accepted now.
    pub(super) fn free_jobs(&self) -> usize {
        let counts = self.planner.counts();
        if counts.max_running == 0 || self.drain_since.is_some() || self.drain.is_draining() {
            return 0;
        }
        (counts.max_running + self.settings.waiting).saturating_sub(self.held.len())
    }

    /// Decides on an offer. A job that is held already is not taken twice:
    /// the same work-queue message again (its offerer missed the answer, or the queue redelivered it) is adopted and goes
    /// on where it is; another message under the same id is a second submission, which the first one settles.
    pub(super) fn offered(&mut self, offer: Offer, ctx: &mut Context<Self>, now: Duration) -> OfferReply {
        let job = offer.ready.job.clone();
        let room = offer.ready.model == self.model && self.free_jobs() > 0;
        let answer = match self.held.get_mut(&job) {
            Some(held) if held.job_seq != offer.delivery.job_seq || offer.delivery.attempt < held.attempt => {
                OfferReply::Settled
            }
            Some(held) => {
                held.attempt = offer.delivery.attempt;
                held.log.adopt(offer.delivery, offer.from);
                OfferReply::Accepted
            }
            None if !room => OfferReply::Busy,
            None => {
                self.accept(offer, ctx, now);
                OfferReply::Accepted
            }
        };
        self.metrics.offer(match answer {
            OfferReply::Accepted => "accepted",
            OfferReply::Busy => "busy",
            OfferReply::Settled => "settled",
        });
        answer
    }

    fn accept(&mut self, offer: Offer, ctx: &mut Context<Self>, now: Duration) {
        let Offer { ready, delivery, shown, from } = offer;
        let job = ready.job.clone();
        let log = JobLog::new(Origin { delivery: delivery.clone(), nodes: vec![from] });
        let writer = self.write_log(&ready, &shown, log.clone(), ctx);
        let (emitter, stop, fault) = match Emitter::resume(self.vocabulary.clone(), ready.stop.clone(), &shown) {
            Ok((emitter, stop)) => (Some(emitter), stop, None),
            Err(error) => (None, None, Some(JobError::new(ErrorCode::Internal, error.to_string()))),
        };
        let held = Held {
            seq: None,
            emitter,
            log,
            _writer: writer,
            _in_flight: self.drain.enter(),
            job_seq: delivery.job_seq,
            attempt: delivery.attempt,
            prompt_tokens: ready.prompt.len(),
            cached_tokens: 0,
            preprocess_ms: ready.preprocess_ms,
            metadata_json: ready.metadata_json.clone(),
            accepted_at: now,
            age: self.age(&delivery.ack_subject),
            planned_at: None,
            first_token_at: None,
            last_token_at: None,
            resumed_tokens: shown.token_ids.len(),
        };
        self.held.insert(job.clone(), held);
        self.check_tombstone(job.clone(), ctx);
        if let Some(error) = fault {
            self.end_job(&job, Outcome::Error(Status::Failed, error), now);
        } else if stop.is_some() {
            let outcome = Outcome::Done { reason: FinishReason::Stop, stop, hidden_tokens: 0 };
            self.end_job(&job, outcome, now);
        } else {
            self.submit(ready, shown, now);
        }
    }

    /// Time since the work queue stored a job; none if its subject does not say.
    fn age(&self, ack_subject: &str) -> Duration {
        let published = published_unix_ms(ack_subject).unwrap_or(u64::MAX);
        Duration::from_millis(self.clock.unix_ms().saturating_sub(published))
    }

    fn submit(&mut self, ready: ReadyJob, shown: Shown, now: Duration) {
        let deadline =
            ready.deadline_unix_ms.map(|at| now + Duration::from_millis(at.saturating_sub(self.clock.unix_ms())));
        let job = ready.job.clone();
        let new = NewSequence {
            job: ready.job,
            prompt: ready.prompt,
            answer: shown.token_ids,
            media: ready.media,
            sampling: ready.sampling,
            max_tokens: ready.max_tokens,
            stop_token_ids: ready.stop_token_ids,
            may_stop_on_text: !ready.stop.is_empty(),
            priority: ready.priority,
            tenant: ready.tenant,
            deadline,
        };
        let mut events = Events::new();
        let seq = self.planner.submit(new, now, &mut events);
        self.by_seq.insert(seq, job.clone());
        if let Entry::Occupied(mut held) = self.held.entry(job) {
            held.get_mut().seq = Some(seq);
        }
        self.dispatch(events, now);
    }

    /// Starts the task that writes the job's output.
    fn write_log(&self, ready: &ReadyJob, shown: &Shown, log: JobLog, ctx: &Context<Self>) -> AbortOnDropHandle<()> {
        let writer = Writer {
            bus: self.bus.clone(),
            job: ready.job.clone(),
            owner: self.id.clone(),
            log,
            stream: ready.stream,
            gap: if ready.class == Class::Interactive { Duration::ZERO } else { self.settings.coalesce },
            last_seq: shown.last_seq,
            index: shown.token_ids.len() as u64,
            metrics: self.metrics.clone(),
        };
        let (job, actor) = (ready.job.clone(), ctx.address());
        AbortOnDropHandle::new(tokio::spawn(async move {
            // An error means that the actor is gone, and the job with it.
            let _ = actor.send(guarded(job, writer).await).await;
        }))
    }

    /// A cancellation that came between preprocessing and acceptance was heard by nobody: its tombstone tells.
    fn check_tombstone(&self, job: JobId, ctx: &mut Context<Self>) {
        let bus = self.bus.clone();
        let read = async move { (bus.is_cancelled(&job).await.unwrap_or(false), job) };
        ctx.spawn(read.into_actor(self).map(|(cancelled, job), actor, _| {
            if cancelled {
                let now = actor.now();
                actor.cancel(&job, now);
            }
        }));
    }

    /// Ends a job on its publisher's wish. What is shown already stays.
    pub(super) fn cancel(&mut self, job: &JobId, now: Duration) {
        if self.held.get(job).is_some_and(|held| held.seq.is_some()) {
            let error = JobError::new(ErrorCode::Cancelled, "cancelled by its publisher");
            self.end_job(job, Outcome::Error(Status::Cancelled, error), now);
        }
    }

    pub(super) fn reply(&self, ctx: &mut Context<Self>, message: Incoming, answer: &OfferReply) {
        let Ok(body) = postcard::to_stdvec(answer) else { return };
        let bus = self.bus.clone();
        let send = async move {
            if let Err(error) = bus.reply(&message, Bytes::from(body)).await {
                tracing::warn!(%error, "offer not answered");
            }
        };
        ctx.spawn(send.into_actor(self));
    }
}

impl Message for Wrote {
    type Result = ();
}
