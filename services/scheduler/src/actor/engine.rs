//! The actor's side of the executor: attaching, sending plans, taking outputs, letting go; and what it tells the world.

use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use millrace_protocol::engine::{Attach, AttachReply, SchedulerBeacon};
use millrace_protocol::plan::StepPlan;
use millrace_protocol::step::StepOutput;
use millrace_protocol::{ActorId, ErrorCode, JobError, Status};

use super::held::Outcome;
use super::{Asked, SchedulerActor};
use crate::policy::{Blame, Events, Plan};
use crate::session::{Answer, DEAD_AFTER};

/// Longest wait for an executor's answer.
const ATTACH_TIMEOUT: Duration = DEAD_AFTER;

/// Jobs are given back when no executor was attached for this long: a spare or restarted one is there sooner.
const ORPHANS_AFTER: Duration = Duration::from_secs(5);

impl SchedulerActor {
    /// Asks for an executor, if one is wanted and free.
    pub(super) fn ask_for_executor(&mut self, ctx: &mut Context<Self>, now: Duration) {
        if self.drain_since.is_some() {
            return;
        }
        if let Some(executor) = self.executors.ask(&self.id, now) {
            self.request_attach(ctx, executor, None);
        }
    }

    /// Tells the executor from time to time that it is still held.
    pub(super) fn renew_hold(&mut self, ctx: &mut Context<Self>, now: Duration) {
        if let Some((executor, session)) = self.executors.renewal(now) {
            self.request_attach(ctx, executor, Some(session));
        }
    }

    fn request_attach(&self, ctx: &mut Context<Self>, executor: ActorId, session: Option<u64>) {
        let attach = Attach { scheduler: self.id.clone(), session, detach: false };
        let Ok(body) = postcard::to_stdvec(&attach) else { return };
        let (bus, subject, asked_at) = (self.bus.clone(), self.bus.subjects().attach(&executor), self.now());
        let ask = async move {
            let reply = bus.request(&subject, Bytes::from(body), ATTACH_TIMEOUT).await;
            let reply = reply.map_err(|error| error.to_string());
            let reply = reply.and_then(|body| postcard::from_bytes(&body).map_err(|error| error.to_string()));
            Asked { executor, renewed: session, asked_at, reply }
        };
        ctx.spawn(ask.into_actor(self).map(|asked, actor, _| actor.answered(asked)));
    }

    fn answered(&mut self, Asked { executor, renewed, asked_at, reply }: Asked) {
        let now = self.now();
        if let Some(renewed) = renewed {
            let held = self.executors.attached.as_mut();
            let Some(held) = held.filter(|held| held.executor == executor && held.session == renewed) else { return };
            let verdict = match reply {
                Ok(AttachReply::Attached { heard_step, answered_step, .. }) => {
                    held.renewed(heard_step, answered_step, asked_at, now)
                }
                Ok(_) => Err("the executor let go of the session".to_owned()),
                // Silence is judged by its length.
                Err(_) => Ok(()),
            };
            if let Err(reason) = verdict {
                self.lose_session(&reason, Blame::Nobody, now);
            }
            return;
        }
        self.executors.asking = None;
        if reply.is_ok() {
            self.executors.replied(&executor);
        }
        match reply {
            Ok(AttachReply::Attached { session, spec, costs, .. }) if spec.model == self.model => {
                tracing::info!(%executor, session, device = %spec.device, "executor attached");
                let mut events = Events::new();
                self.planner.attach(&spec, now, &mut events);
                self.planner.swap_by(&costs);
                self.executors.attach(executor, session, spec, now);
                self.health.set_ready(&self.condition());
                self.beacon_due = true;
                self.dispatch(events, now);
                self.pump(now);
            }
            Ok(AttachReply::Held { by }) => self.executors.held_by(&executor, by),
            Ok(other) => tracing::warn!(%executor, ?other, "an answer that does not fit the question"),
            Err(error) => tracing::debug!(%executor, %error, "executor did not answer"),
        }
    }

    /// Sends as many plans as may be out.
    pub(super) fn pump(&mut self, now: Duration) {
        self.plan_and_dispatch(Events::new(), now);
    }

    /// Sends as many plans as may be out, then carries the events out: the device does not wait for text to be made. What
    /// that ends (a stop text) may make room for others, so it goes on until nothing happens any more.
    fn plan_and_dispatch(&mut self, mut events: Events, now: Duration) {
        loop {
            while self.executors.attached.is_some()
                && let Some(plan) = self.planner.plan(now, &mut events)
            {
                self.books_proven = false;
                self.send_plan(plan, now);
            }
            if events.is_empty() {
                return;
            }
            self.dispatch(std::mem::take(&mut events), now);
        }
    }

    fn send_plan(&mut self, plan: Plan, now: Duration) {
        let Some(attached) = self.executors.attached.as_mut() else { return };
        let tokens = plan.work.iter().map(|work| work.count as usize).sum();
        let plan = StepPlan {
            scheduler: self.id.clone(),
            session: attached.session,
            step: attached.number(tokens, now),
            release: plan.release,
            copies: plan.copies,
            open: plan.open,
            work: plan.work,
        };
        let limit = self.bus.max_payload_bytes();
        let body = match postcard::to_stdvec(&plan) {
            Ok(body) if body.len() <= limit => body,
            Ok(body) => return self.refuse_oversize(&plan, body.len(), limit, now),
            Err(error) => return self.lose_session(&format!("a plan cannot be encoded: {error}"), Blame::Nobody, now),
        };
        let subject = self.bus.subjects().plan(&attached.executor);
        if self.plans.try_send((subject, Bytes::from(body))).is_err() {
            self.lose_session("NATS does not take plans", Blame::Nobody, now);
        }
    }

    /// A plan larger than a NATS message: the longest newcomer cannot be run over this server.
    fn refuse_oversize(&mut self, plan: &StepPlan, bytes: usize, limit: usize, now: Duration) {
        if let Some(open) = plan.open.iter().max_by_key(|open| open.tokens.len()) {
            let message =
                format!("the plan has {bytes} bytes, more than the NATS server's max_payload of {limit}; raise it");
            let error = JobError::new(ErrorCode::TooLarge, message);
            self.end_job(&open.job.clone(), Outcome::Error(Status::Failed, error), now);
        }
        self.lose_session("a plan is larger than a NATS message", Blame::Nobody, now);
    }

    /// Takes a step's output.
    pub(super) fn stepped(&mut self, output: StepOutput) {
        let now = self.now();
        let Some(attached) = self.executors.attached.as_mut() else { return };
        match attached.judge(&output) {
            Answer::Ignore => return,
            Answer::Broken(reason) => return self.lose_session(&reason, Blame::Engine, now),
            Answer::Due { tokens } => self.metrics.step_tokens.observe(tokens as f64),
        }
        self.metrics.step_secs.observe(output.busy_us as f64 / 1e6);
        self.metrics.starved_secs.observe(output.idle_us as f64 / 1e6);
        let busy = Duration::from_micros(output.busy_us);
        let mut events = Events::new();
        if let Err(contradiction) = self.planner.apply(output.tokens, output.failed, busy, &mut events) {
            self.lose_session(&contradiction.to_string(), Blame::Engine, now);
        }
        self.plan_and_dispatch(events, now);
    }

    /// Gives the session up: everything that ran waits for another one.
    pub(super) fn lose_session(&mut self, reason: &str, blame: Blame, now: Duration) {
        if let Some(lost) = self.executors.lose() {
            tracing::warn!(executor = %lost.executor, session = lost.session, reason, "executor lost");
            self.metrics.sessions_lost.inc();
            self.health.set_not_ready(&self.condition(), format!("executor lost: {reason}"));
            self.beacon_due = true;
            let mut events = Events::new();
            self.planner.detach(blame, now, &mut events);
            self.dispatch(events, now);
        }
    }

    /// Without an executor for long, gives the jobs back: another pair may have room, and this one says that it has none.
    pub(super) fn return_orphans(&mut self, now: Duration) {
        if self.executors.attached.is_some() {
            self.alone_since = None;
            return;
        }
        let since = *self.alone_since.get_or_insert(now);
        if now.saturating_sub(since) >= ORPHANS_AFTER {
            self.return_all();
        }
    }

    /// Tells preprocess actors what would be accepted.
    pub(super) fn send_beacon(&mut self, ctx: &mut Context<Self>, now: Duration) {
        let counts = self.planner.counts();
        let narrow = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let beacon = SchedulerBeacon {
            scheduler: self.id.clone(),
            model: self.model.clone(),
            engine: self.executors.attached.as_ref().map(|attached| attached.spec.clone()),
            free_jobs: narrow(self.free_jobs()),
            waiting: narrow(counts.waiting),
            running: narrow(counts.running),
            free_blocks: narrow(counts.free_blocks),
            prefixes: self.planner.prefixes(),
            draining: self.drain.is_draining(),
        };
        self.beacon_sent = Some(now);
        self.beacon_due = false;
        let Ok(body) = serde_json::to_vec(&beacon) else { return };
        let (bus, subject) = (self.bus.clone(), self.bus.subjects().scheduler_beacon(&self.id));
        let send = async move {
            if let Err(error) = bus.publish(&subject, Bytes::from(body)).await {
                tracing::debug!(%error, "beacon not sent");
            }
        };
        ctx.spawn(send.into_actor(self));
    }

    /// Draining: running jobs end by themselves for a while, then the rest goes back to the queue, then the executor.
    pub(super) fn drain_step(&mut self, ctx: &mut Context<Self>, now: Duration) {
        if !self.drain.is_draining() {
            return;
        }
        let since = *self.drain_since.get_or_insert(now);
        if self.held.is_empty() {
            self.give_executor_back(ctx);
        } else if now.saturating_sub(since) >= self.settings.drain_timeout {
            self.return_all();
        }
    }

    fn give_executor_back(&mut self, ctx: &mut Context<Self>) {
        let attached = self.executors.lose();
        self.planner.detach(Blame::Nobody, self.now(), &mut Events::new());
        let (bus, id) = (self.bus.clone(), self.id.clone());
        let detach = async move {
            let Some(attached) = attached else { return };
            let request = Attach { scheduler: id, session: Some(attached.session), detach: true };
            let Ok(body) = postcard::to_stdvec(&request) else { return };
            let subject = bus.subjects().attach(&attached.executor);
            // Without an answer the executor's own hold runs out.
            let _ = bus.request(&subject, Bytes::from(body), ATTACH_TIMEOUT).await;
        };
        ctx.wait(detach.into_actor(self).map(|(), _, ctx: &mut Context<Self>| ctx.stop()));
    }
}
