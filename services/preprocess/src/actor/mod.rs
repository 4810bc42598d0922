//! The preprocess actor. Role: pulls jobs against credits, prepares them, offers them to schedulers, and holds their pages.
//! Bound by the CPU; work that keeps a core busy runs in the blocking pool under its own credits. Hears: the work queue
//! (pull), scheduler beacons, cancellations, page reads, page leases. Sends: offers, terminal messages of jobs that end here.

mod cancellations;
mod deliveries;
mod ending;
mod history;
mod intake;
mod media;
mod page_service;
mod routing;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::prelude::*;
use futures::StreamExt;
use millrace_bus::{Bus, BusError, Incoming, JobConsumer};
use millrace_config::Config;
use millrace_pager::PageStore;
use millrace_protocol::engine::SchedulerBeacon;
use millrace_protocol::{ActorId, Class, ModelName};
use millrace_runtime::{BackoffPolicy, Clock, Credits, DrainGate, Restarts, supervise};
use millrace_telemetry::Health;
use serde::Serialize;
use tokio::sync::{Notify, watch};

use self::cancellations::Cancellations;
use self::deliveries::Deliveries;
use self::ending::Ending;
use self::intake::Intake;
use self::page_service::PageService;
use self::routing::Schedulers;
use crate::cores::Cores;
use crate::metrics::PreprocessMetrics;
use crate::prepare::Preparer;

/// Most jobs of one pull.
const PULL_AT_ONCE: usize = 32;
/// How long a pull waits for the next job.
const PULL_WAIT: Duration = Duration::from_secs(5);
/// How often leases are looked at and gauges set.
const TICK: Duration = Duration::from_millis(500);
/// Messages a subscription holds.
const SUBSCRIPTION_DEPTH: usize = 4_096;
const CONDITION: &str = "preprocess";

/// What a preprocess actor is made of.
pub struct PreprocessParts {
    /// This incarnation; also the node of its pages.
    pub id: ActorId,
    /// Connection; the streams exist.
    pub bus: Bus,
    /// Served models.
    pub models: HashMap<ModelName, Arc<Preparer>>,
    /// Pages; their node is `id`.
    pub pages: Arc<PageStore>,
    /// Credits and stream limits.
    pub config: Config,
    /// Threads for work that keeps a core busy.
    pub cores: Cores,
    /// Time.
    pub clock: Clock,
    /// Readiness.
    pub health: Health,
    /// Says when to stop pulling; counts jobs held here.
    pub drain: DrainGate,
    /// Metrics.
    pub metrics: PreprocessMetrics,
    /// Told why, if the process must end.
    pub fatal: watch::Sender<Option<String>>,
}

/// The preprocess actor.
pub struct PreprocessActor {
    intake: Arc<Intake>,
    pages: PageService,
    credits: HashMap<Class, Credits>,
    config: Config,
    drain: DrainGate,
    health: Health,
    fatal: watch::Sender<Option<String>>,
}

/// State for tests and the admin page.
#[derive(Debug, Clone, Serialize)]
pub struct Observed {
    /// Jobs held here.
    pub held: usize,
    /// Pages held here.
    pub pages: u64,
}

/// Asks for [`Observed`].
#[derive(Message)]
#[rtype(result = "Observed")]
pub struct Observe;

struct Beacon(Incoming);
struct Cancel(Incoming);
struct ReadPage(Incoming);
struct LeasePages(Incoming);

impl PreprocessActor {
    /// Subscribes and starts the actor on the current arbiter.
    ///
    /// # Errors
    /// If NATS refuses.
    pub async fn start(parts: PreprocessParts) -> Result<Addr<Self>, BusError> {
        let PreprocessParts { id, bus, models, pages, config, cores, clock, health, drain, metrics, fatal } = parts;
        let subjects = bus.subjects().clone();
        let beacons = bus.subscribe(&subjects.scheduler_beacons(), SUBSCRIPTION_DEPTH, None).await?;
        let cancels = bus.subscribe(&subjects.cancel_all(), SUBSCRIPTION_DEPTH, None).await?;
        let reads = bus.subscribe(&subjects.page_read(&id), SUBSCRIPTION_DEPTH, None).await?;
        let leases = bus.subscribe(&subjects.page_lease(&id), SUBSCRIPTION_DEPTH, None).await?;
        let credits = Class::ALL.map(|class| (class, Credits::new(config.preprocess.credits(class))));
        let intake = Intake {
            id,
            bus: bus.clone(),
            clock: clock.clone(),
            models,
            pages: Arc::clone(&pages),
            cores,
            max_attempts: config.streams.max_attempts,
            schedulers: Mutex::new(Schedulers::default()),
            room: Notify::new(),
            deliveries: Deliveries::default(),
            cancellations: Cancellations::default(),
            ending: Ending { bus: bus.clone(), metrics: metrics.clone() },
            metrics,
        };
        let actor = Self {
            intake: Arc::new(intake),
            pages: PageService { store: pages, bus, clock },
            credits: HashMap::from(credits),
            config,
            drain,
            health,
            fatal,
        };
        Ok(Self::create(move |ctx| {
            ctx.add_stream(beacons.into_stream().map(Beacon));
            ctx.add_stream(cancels.into_stream().map(Cancel));
            ctx.add_stream(reads.into_stream().map(ReadPage));
            ctx.add_stream(leases.into_stream().map(LeasePages));
            actor
        }))
    }

    fn tick(&self) {
        self.pages.expire();
        let counters = self.pages.store.counters();
        let metrics = &self.intake.metrics;
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        metrics.page_ram_bytes.set(gauge(counters.ram_bytes));
        metrics.page_disk_bytes.set(gauge(counters.disk_bytes));
        metrics.pages.set(gauge(counters.pages));
        metrics.page_spills.set(gauge(counters.spills));
        metrics.pages_corrupt.set(gauge(counters.corrupt));
        for (class, credits) in &self.credits {
            let held = credits.total() - credits.available();
            metrics.held.with_label_values(&[class.as_str()]).set(gauge(held as u64));
        }
    }

    fn die(&self, why: &str) {
        self.health.set_not_ready(CONDITION, why);
        self.fatal.send_replace(Some(format!("preprocess: {why}")));
    }
}

impl Actor for PreprocessActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let beat = self.intake.deliveries.clone().beat(self.intake.bus.clone(), self.config.streams.ack_wait);
        ctx.spawn(beat.into_actor(self));
        for class in Class::ALL {
            let puller = Puller {
                consumer: self.intake.bus.job_consumer(class),
                credits: self.credits[&class].clone(),
                intake: Arc::clone(&self.intake),
                drain: self.drain.clone(),
            };
            ctx.spawn(puller.supervised().into_actor(self));
        }
        ctx.run_interval(TICK, |actor, _| actor.tick());
        self.health.set_ready(CONDITION);
    }
}

impl StreamHandler<Beacon> for PreprocessActor {
    fn handle(&mut self, Beacon(message): Beacon, _: &mut Self::Context) {
        match serde_json::from_slice::<SchedulerBeacon>(&message.payload) {
            Ok(beacon) => {
                if self.intake.table().hear(beacon, self.intake.clock.now()) {
                    self.intake.room.notify_waiters();
                }
            }
            Err(error) => tracing::warn!(%error, "beacon ignored"),
        }
    }

    fn finished(&mut self, _: &mut Self::Context) {
        self.die("the beacon subscription ended");
    }
}

impl StreamHandler<Cancel> for PreprocessActor {
    fn handle(&mut self, Cancel(message): Cancel, _: &mut Self::Context) {
        if let Some(job) = self.intake.bus.subjects().parse_cancel(&message.subject) {
            self.intake.cancellations.hear(&job);
        }
    }

    fn finished(&mut self, _: &mut Self::Context) {
        self.die("the cancel subscription ended");
    }
}

impl StreamHandler<ReadPage> for PreprocessActor {
    fn handle(&mut self, ReadPage(request): ReadPage, ctx: &mut Self::Context) {
        // Reads run side by side; each reader bounds how many it has under way.
        ctx.spawn(self.pages.clone().read(request).into_actor(self));
    }

    fn finished(&mut self, _: &mut Self::Context) {
        self.die("the page subscription ended");
    }
}

impl StreamHandler<LeasePages> for PreprocessActor {
    fn handle(&mut self, LeasePages(message): LeasePages, _: &mut Self::Context) {
        self.pages.lease(&message);
    }

    fn finished(&mut self, _: &mut Self::Context) {
        self.die("the lease subscription ended");
    }
}

impl Handler<Observe> for PreprocessActor {
    type Result = MessageResult<Observe>;

    fn handle(&mut self, _: Observe, _: &mut Self::Context) -> Self::Result {
        MessageResult(Observed { held: self.drain.in_flight(), pages: self.pages.store.counters().pages })
    }
}

/// Pulls the jobs of one class.
struct Puller {
    consumer: JobConsumer,
    credits: Credits,
    intake: Arc<Intake>,
    drain: DrainGate,
}

impl Puller {
    /// Pulls until the process drains; an error (NATS away, consumer gone) is waited out.
    async fn supervised(self) {
        let name = format!("pull-{}", self.consumer.class());
        let (clock, drain, restarts) = (self.intake.clock.clone(), self.drain.clone(), Restarts::default());
        supervise(&name, BackoffPolicy::default(), &clock, &drain, &restarts, || self.pull()).await;
    }

    async fn pull(&self) -> Result<(), BusError> {
        loop {
            let taken = tokio::select! {
                () = self.drain.draining() => return Ok(()),
                taken = self.next() => taken?,
            };
            for (delivery, credit) in taken {
                let class = self.consumer.class();
                self.intake.metrics.pulled.with_label_values(&[class.as_str()]).inc();
                let Some(in_flight) = self.drain.enter() else {
                    let back = self.intake.bus.nak(&delivery.delivery.ack_subject, Duration::ZERO).await;
                    back.unwrap_or_else(|error| tracing::warn!(%error, "job not returned; it comes again by itself"));
                    continue;
                };
                let intake = Arc::clone(&self.intake);
                tokio::spawn(async move {
                    let _in_flight = in_flight;
                    intake.take(delivery, credit).await;
                });
            }
        }
    }

    /// As many jobs as there are free credits, at least one.
    async fn next(&self) -> Result<Vec<(millrace_bus::JobDelivery, millrace_runtime::Credit)>, BusError> {
        let mut credits = vec![self.credits.acquire().await];
        credits.extend(std::iter::from_fn(|| self.credits.try_acquire()).take(PULL_AT_ONCE - 1));
        let jobs = self.consumer.pull(credits.len(), PULL_WAIT).await?;
        Ok(jobs.into_iter().zip(credits).collect())
    }
}
