//! The scheduler actor: one model, one executor at a time. Role: owns accepted jobs from offer to final. Bound by the CPU
//! (planning, detokenising); everything that waits runs in tasks of its own. Hears: offers, step outputs, cancellations,
//! executor beacons. Sends: beacons, attach requests, plans, output chunks, acknowledgements, page leases.

mod engine;
mod held;
mod intake;
mod observe;
mod outcome;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use millrace_bus::{Bus, Incoming, Subscription};
use millrace_protocol::engine::{AttachReply, BEACON_EVERY_MS, ExecutorBeacon};
use millrace_protocol::ready::Offer;
use millrace_protocol::step::StepOutput;
use millrace_protocol::{ActorId, JobId, ModelName};
use millrace_runtime::{Clock, DrainGate, InFlight};
use millrace_telemetry::Health;
use tokio::sync::{mpsc, watch};

use self::held::Held;
pub use self::observe::{Observe, Snapshot};
use crate::emit::Vocabulary;
use crate::error::SchedulerError;
use crate::heartbeat;
use crate::log::Ended;
use crate::metrics::{ModelMetrics, SchedulerMetrics};
use crate::policy::{Blame, Events, Limits, Planner, SeqId};
use crate::session::Executors;
use crate::settings::Settings;

/// How often deadlines, silences and beacons are looked at.
const TICK: Duration = Duration::from_millis(25);
/// Messages a subscription holds.
const SUBSCRIPTION_DEPTH: usize = 4_096;
/// Plans on their way to the connection: more than run-ahead means that NATS does not take them.
const PLANS_QUEUED: usize = 16;

/// What a scheduler is made of.
pub struct SchedulerParts {
    /// This incarnation.
    pub id: ActorId,
    /// The model it schedules.
    pub model: ModelName,
    /// Checkpoint folder, for the tokenizer.
    pub model_dir: PathBuf,
    /// Connection; the streams exist.
    pub bus: Bus,
    /// Limits and times.
    pub settings: Settings,
    /// Metrics.
    pub metrics: SchedulerMetrics,
    /// Readiness: `scheduler-<model>` holds while an executor is attached.
    pub health: Health,
    /// Time.
    pub clock: Clock,
    /// Says when to take nothing new; counts jobs held here.
    pub drain: DrainGate,
    /// Told why, if the process must end.
    pub fatal: watch::Sender<Option<String>>,
}

/// The scheduler actor.
pub struct SchedulerActor {
    id: ActorId,
    model: ModelName,
    bus: Bus,
    settings: Settings,
    metrics: ModelMetrics,
    health: Health,
    clock: Clock,
    origin: Instant,
    drain: DrainGate,
    fatal: watch::Sender<Option<String>>,
    vocabulary: Arc<Vocabulary>,
    planner: Planner,
    held: HashMap<JobId, Held>,
    by_seq: HashMap<SeqId, JobId>,
    executors: Executors,
    plans: mpsc::Sender<(String, Bytes)>,
    subscriptions: Option<Subscriptions>,
    beacon_sent: Option<Duration>,
    beacon_due: bool,
    beat_sent: Duration,
    drain_since: Option<Duration>,
    /// Since when no executor is attached.
    alone_since: Option<Duration>,
    reconnects: u64,
    books_proven: bool,
    /// Keeps the process from ending before the executor is given back.
    in_flight: Option<InFlight>,
}

struct Subscriptions {
    offers: Subscription,
    outputs: Subscription,
    cancels: Subscription,
    beacons: Subscription,
    plans: mpsc::Receiver<(String, Bytes)>,
}

#[derive(Message)]
#[rtype(result = "()")]
struct Offered(Incoming);

#[derive(Message)]
#[rtype(result = "()")]
struct Stepped(Incoming);

#[derive(Message)]
#[rtype(result = "()")]
struct CancelHeard(Incoming);

#[derive(Message)]
#[rtype(result = "()")]
struct BeaconHeard(Incoming);

/// Stops the actor at once: jobs are left to their redelivery.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct StopNow;

impl SchedulerActor {
    /// Subscribes and starts. The actor runs on the arbiter of the caller.
    ///
    /// # Errors
    /// [`SchedulerError::Tokenizer`], [`SchedulerError::Bus`].
    pub async fn start(parts: SchedulerParts) -> Result<Addr<Self>, SchedulerError> {
        let SchedulerParts { id, model, model_dir, bus, settings, metrics, health, clock, drain, fatal } = parts;
        let vocabulary = Arc::new(Vocabulary::load(&model_dir)?);
        let subjects = bus.subjects();
        let (plans, queued) = mpsc::channel(PLANS_QUEUED);
        let subscriptions = Subscriptions {
            offers: bus.subscribe(&subjects.offer(&id), SUBSCRIPTION_DEPTH, None).await?,
            outputs: bus.subscribe(&subjects.step(&id), SUBSCRIPTION_DEPTH, None).await?,
            cancels: bus.subscribe(&subjects.cancel_all(), SUBSCRIPTION_DEPTH, None).await?,
            beacons: bus.subscribe(&subjects.executor_beacons(), SUBSCRIPTION_DEPTH, None).await?,
            plans: queued,
        };
        let in_flight = drain.enter();
        let (origin, reconnects) = (clock.now(), bus.events().reconnects());
        Ok(Self {
            metrics: metrics.of(&model),
            planner: Planner::new(Limits { plan_bytes: bus.max_payload_bytes(), ..settings.limits.clone() }),
            id,
            model,
            bus,
            settings,
            health,
            clock,
            origin,
            drain,
            fatal,
            vocabulary,
            held: HashMap::new(),
            by_seq: HashMap::new(),
            executors: Executors::default(),
            plans,
            subscriptions: Some(subscriptions),
            beacon_sent: None,
            beacon_due: true,
            beat_sent: Duration::ZERO,
            drain_since: None,
            alone_since: None,
            reconnects,
            books_proven: false,
            in_flight,
        }
        .start())
    }

    /// Time since the actor started.
    fn now(&self) -> Duration {
        self.clock.now().saturating_duration_since(self.origin)
    }

    fn condition(&self) -> String {
        format!("scheduler-{}", self.model)
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        let now = self.now();
        if let Some(reason) = self.executors.overdue(now, self.settings.step_timeout) {
            self.lose_session(&reason, Blame::Engine, now);
        }
        let reconnects = self.bus.events().reconnects();
        if std::mem::replace(&mut self.reconnects, reconnects) != reconnects {
            // Plans or outputs may be lost, and nothing would tell before the step timeout.
            self.lose_session("the connection to NATS was interrupted", Blame::Nobody, now);
        }
        self.ask_for_executor(ctx, now);
        self.renew_hold(ctx, now);
        self.return_orphans(now);
        let mut events = Events::new();
        self.planner.expire(now, &mut events);
        self.dispatch(events, now);
        self.pump(now);
        if now.saturating_sub(self.beat_sent) >= self.settings.ack_wait / 3 {
            self.beat_sent = now;
            let held = self.held.iter().map(|(job, held)| (job.clone(), held.log.origin())).collect();
            ctx.spawn(heartbeat::beat(self.bus.clone(), held).into_actor(self));
        }
        let every = Duration::from_millis(BEACON_EVERY_MS);
        let due = self.beacon_sent.is_none_or(|at| now.saturating_sub(at) >= every);
        if due || self.beacon_due {
            self.send_beacon(ctx, now);
        }
        self.set_gauges();
        self.drain_step(ctx, now);
    }
}

impl Actor for SchedulerActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.health.set_not_ready(&self.condition(), "no executor is attached");
        if let Some(subscriptions) = self.subscriptions.take() {
            ctx.add_stream(subscriptions.offers.into_stream().map(Offered));
            ctx.add_stream(subscriptions.outputs.into_stream().map(Stepped));
            ctx.add_stream(subscriptions.cancels.into_stream().map(CancelHeard));
            ctx.add_stream(subscriptions.beacons.into_stream().map(BeaconHeard));
            let sender = send_plans(self.bus.clone(), subscriptions.plans).into_actor(self);
            ctx.spawn(sender.map(|failure, actor, _| {
                if let Some(failure) = failure {
                    let _ = actor.fatal.send(Some(failure));
                }
            }));
        }
        ctx.run_interval(TICK, |actor, ctx| actor.tick(ctx));
        self.tick(ctx);
    }

    fn stopped(&mut self, _ctx: &mut Self::Context) {
        self.health.remove(&self.condition());
        self.in_flight = None;
    }
}

impl StreamHandler<Offered> for SchedulerActor {
    fn handle(&mut self, Offered(message): Offered, ctx: &mut Self::Context) {
        let now = self.now();
        match postcard::from_bytes::<Offer>(&message.payload) {
            Ok(offer) => {
                let answer = self.offered(offer, ctx, now);
                self.reply(ctx, message, &answer);
                self.pump(now);
                self.beacon_due = true;
            }
            Err(error) => tracing::warn!(%error, "an offer that is none"),
        }
    }

    fn finished(&mut self, _ctx: &mut Self::Context) {
        let _ = self.fatal.send(Some("the connection to NATS is closed".to_owned()));
    }
}

impl StreamHandler<Stepped> for SchedulerActor {
    fn handle(&mut self, Stepped(message): Stepped, _ctx: &mut Self::Context) {
        match postcard::from_bytes::<StepOutput>(&message.payload) {
            Ok(output) => self.stepped(output),
            Err(error) => tracing::warn!(%error, "a step output that is none"),
        }
    }

    fn finished(&mut self, _ctx: &mut Self::Context) {}
}

impl StreamHandler<CancelHeard> for SchedulerActor {
    fn handle(&mut self, CancelHeard(message): CancelHeard, _ctx: &mut Self::Context) {
        if let Some(job) = self.bus.subjects().parse_cancel(&message.subject) {
            let now = self.now();
            self.cancel(&job, now);
            self.pump(now);
        }
    }

    fn finished(&mut self, _ctx: &mut Self::Context) {}
}

impl StreamHandler<BeaconHeard> for SchedulerActor {
    fn handle(&mut self, BeaconHeard(message): BeaconHeard, ctx: &mut Self::Context) {
        let Ok(beacon) = serde_json::from_slice::<ExecutorBeacon>(&message.payload) else { return };
        if beacon.spec.model == self.model {
            let now = self.now();
            self.executors.observe(&beacon, now);
            self.ask_for_executor(ctx, now);
        }
    }

    fn finished(&mut self, _ctx: &mut Self::Context) {}
}

impl Handler<StopNow> for SchedulerActor {
    type Result = ();

    fn handle(&mut self, _: StopNow, ctx: &mut Self::Context) {
        ctx.stop();
    }
}

/// Sends plans in their order. Returns why it ended, if not because the actor did.
async fn send_plans(bus: Bus, mut plans: mpsc::Receiver<(String, Bytes)>) -> Option<String> {
    while let Some((subject, body)) = plans.recv().await {
        // A plan that is not sent is a gap: the executor or the step timeout ends the session.
        if let Err(error) = bus.publish(&subject, body).await {
            tracing::warn!(%error, "a plan was not sent");
        }
    }
    None
}

/// What a task about an executor brings back.
struct Asked {
    executor: ActorId,
    renewed: Option<u64>,
    asked_at: Duration,
    reply: Result<AttachReply, String>,
}

/// What a writer's task brings back.
struct Wrote {
    job: JobId,
    ended: Ended,
}

/// Catches a panic of a writer, so that one job's fault stays that job's.
async fn guarded(job: JobId, writer: crate::log::Writer) -> Wrote {
    let ended = std::panic::AssertUnwindSafe(writer.run()).catch_unwind().await;
    let ended = ended
        .unwrap_or_else(|panic| Ended::Crashed(millrace_runtime::supervise::panic_text(panic.as_ref()).to_owned()));
    Wrote { job, ended }
}
