//! The executor actor. Role: takes plans from the scheduler that holds it, runs them on the device thread, answers with
//! outputs. Bound by the device; its mailbox gets plans, attach requests, device events and a timer. Hears: attach
//! (request), plan (core). Sends: step outputs, beacons (core).
//!
//! Order is kept by `ctx.wait`: while one message is being published no other is handled, so outputs leave in step order and
//! the subscription's bounded queue holds back the rest.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use futures::StreamExt;
use millrace_bus::{Bus, BusError, Incoming};
use millrace_pager::PageStore;
use millrace_protocol::engine::{Attach, AttachReply, BEACON_EVERY_MS, EngineCosts, EngineSpec, ExecutorBeacon};
use millrace_protocol::plan::StepPlan;
use millrace_protocol::step::StepOutput;
use millrace_protocol::{ActorId, PageRef, SlotId};
use millrace_runtime::{Clock, InFlight};
use millrace_telemetry::Health;
use serde::Serialize;
use tokio::sync::{mpsc, watch};

use crate::device::{Device, DeviceEvent, HandOffError};
use crate::engine::StepEngine;
use crate::measure::measure;
use crate::metrics::ExecutorMetrics;
use crate::pages::PageReader;
use crate::session::{Granted, Session, Verdict};

/// Plans that may wait for the device: more than any scheduler runs ahead.
const HAND_OFF_DEPTH: usize = 8;
/// Messages a subscription holds.
const SUBSCRIPTION_DEPTH: usize = 256;
const CONDITION: &str = "executor";

/// What an executor actor is made of.
pub struct ExecutorParts {
    /// This incarnation.
    pub id: ActorId,
    /// The engine, loaded.
    pub engine: Box<dyn StepEngine>,
    /// Host memory for KV blocks that leave the pool, in bytes.
    pub swap_bytes: u64,
    /// Connection.
    pub bus: Bus,
    /// Pager of the same process, if it has one.
    pub pages: Option<Arc<PageStore>>,
    /// Time.
    pub clock: Clock,
    /// Readiness.
    pub health: Health,
    /// Metrics.
    pub metrics: ExecutorMetrics,
    /// Told why, if the process must end.
    pub fatal: watch::Sender<Option<String>>,
    /// Held until the device thread has let the engine go.
    pub in_use: Option<InFlight>,
}

/// The executor.
pub struct ExecutorActor {
    id: ActorId,
    spec: EngineSpec,
    bus: Bus,
    clock: Clock,
    health: Health,
    metrics: ExecutorMetrics,
    fatal: watch::Sender<Option<String>>,
    device: Device,
    reader: PageReader,
    session: Session,
    /// Pages of each open slot, to stop transfers when it closes.
    pages: HashMap<SlotId, Vec<PageRef>>,
    steps: u64,
    costs: EngineCosts,
    reconnects: u64,
}

/// State for tests and the admin page.
#[derive(Debug, Clone, Serialize)]
pub struct Observed {
    /// Holder of the session.
    pub attached_to: Option<ActorId>,
    /// Steps computed.
    pub steps: u64,
    /// Sequences that hold a slot.
    pub open_slots: usize,
}

/// Asks for [`Observed`].
#[derive(Message)]
#[rtype(result = "Observed")]
pub struct Observe;

struct AttachRequest(Incoming);
struct PlanMessage(Incoming);

impl ExecutorActor {
    /// Subscribes, starts the device thread, and starts the actor on the current arbiter.
    ///
    /// # Errors
    /// If NATS or the system refuses.
    pub async fn start(parts: ExecutorParts) -> Result<Addr<Self>, StartError> {
        let ExecutorParts { id, mut engine, swap_bytes, bus, pages, clock, health, metrics, fatal, in_use } = parts;
        let spec = engine.spec();
        if let Some(reader) = engine.memory_reader() {
            metrics.show_memory(spec.model.as_str(), reader);
        }
        if let Some(counts) = engine.encoder_counts() {
            metrics.show_encoder(spec.model.as_str(), counts);
        }
        let measured = clock.clone();
        let (engine, costs) = tokio::task::spawn_blocking(move || {
            let host_blocks = engine.keep_host_blocks(swap_bytes);
            let costs = measure(engine.as_mut(), host_blocks, &measured);
            (engine, costs)
        })
        .await
        .map_err(|ended| StartError::Measure(ended.to_string()))?;
        tracing::info!(?costs, "engine measured");
        let subjects = bus.subjects().clone();
        let attach = bus.subscribe(&subjects.attach(&id), SUBSCRIPTION_DEPTH, None).await?;
        let plans = bus.subscribe(&subjects.plan(&id), SUBSCRIPTION_DEPTH, None).await?;
        let runtime = tokio::runtime::Handle::current();
        let reader = PageReader::new(bus.clone(), pages, clock.clone(), runtime, metrics.clone());
        let (sender, events) = mpsc::channel(HAND_OFF_DEPTH);
        let device = Device::start(engine, Box::new(reader.clone()), HAND_OFF_DEPTH, clock.clone(), sender, in_use)?;
        let session = Session::new(clock.unix_ms());
        let reconnects = bus.events().reconnects();
        health.set_not_ready(CONDITION, "the actor has not started");
        Ok(Self::create(move |ctx| {
            ctx.add_stream(attach.into_stream().map(AttachRequest));
            ctx.add_stream(plans.into_stream().map(PlanMessage));
            ctx.add_stream(futures::stream::unfold(events, |mut events| async move {
                events.recv().await.map(|event| (event, events))
            }));
            Self {
                id,
                spec,
                bus,
                clock,
                health,
                metrics,
                fatal,
                device,
                reader,
                session,
                pages: HashMap::new(),
                steps: 0,
                costs,
                reconnects,
            }
        }))
    }

    fn publish(&self, subject: String, payload: Bytes, ctx: &mut Context<Self>) {
        let bus = self.bus.clone();
        let sent = async move {
            if let Err(error) = bus.publish(&subject, payload).await {
                // The peer notices the gap by step numbers or silence and starts a new session.
                tracing::warn!(%subject, %error, "message not sent");
            }
        };
        ctx.wait(sent.into_actor(self));
    }

    fn beacon(&mut self, ctx: &mut Context<Self>) {
        self.session.expire(self.clock.now());
        let reconnects = self.bus.events().reconnects();
        if std::mem::replace(&mut self.reconnects, reconnects) != reconnects && self.session.holder().is_some() {
            // Plans may be lost; the holder hears of it when it renews, and begins anew.
            tracing::warn!("the connection to NATS was interrupted: session ended");
            self.metrics.broken_sessions.inc();
            self.session.end();
        }
        let beacon = ExecutorBeacon {
            executor: self.id.clone(),
            spec: self.spec.clone(),
            attached_to: self.session.holder().cloned(),
            steps: self.steps,
        };
        match serde_json::to_vec(&beacon) {
            Ok(json) => self.publish(self.bus.subjects().executor_beacon(&self.id), json.into(), ctx),
            Err(error) => tracing::error!(%error, "beacon"),
        }
    }

    fn send_output(&self, scheduler: &ActorId, output: &StepOutput, ctx: &mut Context<Self>) {
        match postcard::to_stdvec(output) {
            Ok(bytes) => self.publish(self.bus.subjects().step(scheduler), bytes.into(), ctx),
            Err(error) => self.die(format!("a step output cannot be encoded: {error}")),
        }
    }

    /// Ends the session and tells its holder why.
    fn break_session(&mut self, plan: &StepPlan, why: String, ctx: &mut Context<Self>) {
        tracing::warn!(scheduler = %plan.scheduler, session = plan.session, %why, "session broken");
        self.metrics.broken_sessions.inc();
        self.session.end();
        let output = StepOutput {
            executor: self.id.clone(),
            session: plan.session,
            step: plan.step,
            tokens: Vec::new(),
            failed: Vec::new(),
            broken: Some(why),
            busy_us: 0,
            idle_us: 0,
        };
        self.send_output(&plan.scheduler, &output, ctx);
    }

    fn run(&mut self, plan: StepPlan, ctx: &mut Context<Self>) {
        for slot in &plan.release {
            self.reader.forget(self.pages.remove(slot).iter().flatten());
        }
        for open in &plan.open {
            let pages: Vec<PageRef> = open.media.iter().map(|item| item.patches.clone()).collect();
            pages.iter().for_each(|page| self.reader.begin(page));
            self.pages.insert(open.slot, pages);
        }
        let open = i64::try_from(self.pages.len()).unwrap_or(i64::MAX);
        self.metrics.open_slots.with_label_values(&[self.spec.model.as_str()]).set(open);
        let refused =
            StepPlan { release: Vec::new(), copies: Vec::new(), open: Vec::new(), work: Vec::new(), ..plan.clone() };
        match self.device.step(plan) {
            Ok(()) => {}
            Err(HandOffError::Full) => self.break_session(&refused, HandOffError::Full.to_string(), ctx),
            Err(HandOffError::Ended) => self.die(HandOffError::Ended.to_string()),
        }
    }

    fn attach(&mut self, request: &Attach) -> AttachReply {
        if request.detach {
            self.session.detach(&request.scheduler);
            return AttachReply::Detached;
        }
        match self.session.attach(&request.scheduler, request.session, self.clock.now()) {
            Granted::New(session) => {
                self.reader.forget(self.pages.values().flatten());
                self.pages.clear();
                if let Err(error) = self.device.reset() {
                    // A full hand-off empties by itself; the scheduler asks again.
                    tracing::warn!(%error, "attach refused");
                    self.session.end();
                    return AttachReply::Lost;
                }
                tracing::info!(scheduler = %request.scheduler, session, "attached");
                self.attached(session)
            }
            Granted::Renewed(session) => self.attached(session),
            Granted::HeldBy(by) => AttachReply::Held { by },
            Granted::Lost => AttachReply::Lost,
        }
    }

    fn attached(&self, session: u64) -> AttachReply {
        let (heard_step, answered_step) = self.session.progress();
        AttachReply::Attached { session, spec: self.spec.clone(), costs: self.costs, heard_step, answered_step }
    }

    fn die(&self, why: String) {
        tracing::error!(%why, "the executor cannot go on");
        self.health.set_not_ready(CONDITION, why.clone());
        self.fatal.send_replace(Some(why));
    }
}

impl Actor for ExecutorActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.health.set_ready(CONDITION);
        self.beacon(ctx);
        ctx.run_interval(Duration::from_millis(BEACON_EVERY_MS), |actor, ctx| actor.beacon(ctx));
    }
}

impl StreamHandler<AttachRequest> for ExecutorActor {
    fn finished(&mut self, _: &mut Self::Context) {
        self.die("the attach subscription ended".into());
    }

    fn handle(&mut self, AttachRequest(incoming): AttachRequest, ctx: &mut Self::Context) {
        let reply = match postcard::from_bytes::<Attach>(&incoming.payload) {
            Ok(request) => postcard::to_stdvec(&self.attach(&request)),
            Err(error) => Err(error),
        };
        match (reply, incoming.reply) {
            (Ok(reply), Some(subject)) => self.publish(subject, reply.into(), ctx),
            (Err(error), _) => tracing::warn!(%error, "attach request ignored"),
            (Ok(_), None) => {}
        }
        self.beacon(ctx);
    }
}

impl StreamHandler<PlanMessage> for ExecutorActor {
    fn finished(&mut self, _: &mut Self::Context) {
        self.die("the plan subscription ended".into());
    }

    fn handle(&mut self, PlanMessage(incoming): PlanMessage, ctx: &mut Self::Context) {
        let plan = match postcard::from_bytes::<StepPlan>(&incoming.payload) {
            Ok(plan) => plan,
            Err(error) => return tracing::warn!(%error, "plan ignored"),
        };
        match self.session.admit(&plan, self.clock.now()) {
            Verdict::Run => self.run(plan, ctx),
            Verdict::Ignore => {}
            Verdict::Broken(why) => self.break_session(&plan, why, ctx),
        }
    }
}

impl StreamHandler<DeviceEvent> for ExecutorActor {
    fn finished(&mut self, _: &mut Self::Context) {
        self.die("the device thread ended".into());
    }

    fn handle(&mut self, event: DeviceEvent, ctx: &mut Self::Context) {
        let (scheduler, output, tokens, busy, idle) = match event {
            DeviceEvent::Stepped { scheduler, output, tokens, busy, idle } => (scheduler, output, tokens, busy, idle),
            DeviceEvent::Died(why) => return self.die(why),
        };
        self.steps += 1;
        self.metrics.steps.inc();
        self.metrics.busy_seconds.observe(busy.as_secs_f64());
        self.metrics.idle_seconds.observe(idle.as_secs_f64());
        #[allow(clippy::cast_precision_loss)] // A step holds far fewer than 2^53 tokens.
        self.metrics.step_tokens.observe(tokens as f64);
        self.metrics.drawn_tokens.inc_by(output.tokens.len() as u64);
        for (_, error) in &output.failed {
            self.metrics.failed_sequences.with_label_values(&[error.code.as_str()]).inc();
        }
        if output.broken.is_some() && self.session.number() == Some(output.session) {
            self.metrics.broken_sessions.inc();
            self.session.end();
        }
        self.session.answered(output.session, output.step);
        self.send_output(&scheduler, &output, ctx);
    }
}

impl Handler<Observe> for ExecutorActor {
    type Result = MessageResult<Observe>;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Self::Result {
        MessageResult(Observed {
            attached_to: self.session.holder().cloned(),
            steps: self.steps,
            open_slots: self.pages.len(),
        })
    }
}

/// What keeps an executor from starting.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// NATS.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The device thread.
    #[error("the device thread cannot start: {0}")]
    Thread(#[from] std::io::Error),
    /// The engine.
    #[error("the engine fails in its first step: {0}")]
    Measure(String),
}
