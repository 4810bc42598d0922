//! The composition root: starts the actors of the chosen roles in this process, runs them until a signal, and drains them
//! in the order in which work flows.

mod roles;

pub use roles::load_options;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use millrace_bus::{Bus, ServiceHandle};
use millrace_config::Config;
use millrace_pager::{PageStore, PagerLimits};
use millrace_protocol::ActorId;
use millrace_runtime::{Clock, DrainGate};
use millrace_telemetry::{AdminServer, Health, Registry};
use tokio::sync::{oneshot, watch};

use crate::exit;
use crate::signals::StopSignals;

/// Longest wait for device threads to let their engines go.
const DEVICES_END: Duration = Duration::from_secs(20);
/// How often a draining process looks whether its pages are free.
const PAGES_LOOK: Duration = Duration::from_millis(100);

/// Which actors this process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    /// Preprocess actors.
    pub preprocess: bool,
    /// Schedulers.
    pub schedule: bool,
    /// Executors.
    pub execute: bool,
}

impl Roles {
    fn names(self) -> Vec<&'static str> {
        let all = [(self.preprocess, "preprocess"), (self.schedule, "schedule"), (self.execute, "execute")];
        all.into_iter().filter_map(|(on, name)| on.then_some(name)).collect()
    }
}

/// What the actors of one process share.
#[derive(Clone)]
struct Shared {
    config: Config,
    bus: Bus,
    /// For jobs and their media, where plans and outputs go over `bus`: a burst of images would hold them up.
    jobs: Option<Bus>,
    clock: Clock,
    health: Health,
    registry: Registry,
    /// Stops intake; preprocess counts its jobs here.
    intake: DrainGate,
    /// Stops schedulers; they count their jobs here.
    running: DrainGate,
    /// Counts device threads, which outlive their actors for a moment.
    devices: DrainGate,
    fatal: watch::Sender<Option<String>>,
    pages: Option<Arc<PageStore>>,
    node: ActorId,
}

/// Runs until SIGTERM, Ctrl-C or a fatal fault; a signal drains first. All paths in `config.models` are folders; metrics go into
/// `registry`.
///
/// # Errors
/// Whatever keeps an actor from starting, or ends it.
pub async fn run(config: Config, roles: Roles, registry: Registry) -> Result<ExitCode> {
    let mut signals = StopSignals::listen()?;
    let (fatal, died) = watch::channel(None);
    let shared = tokio::select! {
        shared = shared(config, roles, registry, fatal) => shared?,
        () = signals.next() => return Ok(ExitCode::from(exit::OK)),
    };
    let _leaving = Leaving([Some(shared.bus.clone()), shared.jobs.clone()]);
    let code = tokio::select! {
        served = Served::start(&shared, roles) => match served {
            Ok(served) => Ok(served.until_stopped(&shared, roles, died, &mut signals).await),
            Err(error) => Err(error),
        },
        () = signals.next() => {
            tracing::info!("told to end before it was ready");
            Ok(ExitCode::from(exit::OK))
        }
    };
    if let Some(jobs) = &shared.jobs {
        jobs.shutdown().await;
    }
    shared.bus.shutdown().await;
    code
}

/// Whoever drops a run half way has no more use for its connections, and may own their server.
struct Leaving([Option<Bus>; 2]);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.iter().flatten().for_each(Bus::expect_end);
    }
}

/// A process that serves.
struct Served {
    admin: AdminServer,
    actors: Actors,
    services: Vec<ServiceHandle>,
}

impl Served {
    async fn start(shared: &Shared, roles: Roles) -> Result<Self> {
        let (listen, registry) = (shared.config.telemetry.listen, shared.registry.clone());
        let admin = AdminServer::start(listen, registry, shared.health.clone()).await?;
        let actors = Actors::start(shared.clone(), roles).await?;
        let services = register(shared, roles).await?;
        tracing::info!(
            roles = roles.names().join("+"),
            admin = %admin.address(),
            nats = shared.bus.url(),
            node = %shared.node,
            "ready"
        );
        Ok(Self { admin, actors, services })
    }

    /// Serves until a signal or a fatal fault, and ends in order.
    async fn until_stopped(
        self,
        shared: &Shared,
        roles: Roles,
        mut died: watch::Receiver<Option<String>>,
        signals: &mut StopSignals,
    ) -> ExitCode {
        let why = tokio::select! {
            () = signals.next() => None,
            died = died.wait_for(Option::is_some) => died.map_or(None, |why| why.clone()),
        };
        let code = match why {
            Some(why) => {
                tracing::error!(%why, "this process cannot go on");
                exit::FAILED
            }
            None => {
                drain(shared, roles, signals).await;
                exit::OK
            }
        };
        for service in self.services {
            service.stop().await;
        }
        self.actors.stop().await;
        if !shared.devices.wait_idle(DEVICES_END).await {
            tracing::warn!("a device thread does not end");
        }
        self.admin.shutdown().await;
        ExitCode::from(code)
    }
}

async fn shared(
    config: Config,
    roles: Roles,
    registry: Registry,
    fatal: watch::Sender<Option<String>>,
) -> Result<Shared> {
    let clock = Clock::system();
    let node = roles::new_id("node", &clock)?;
    let bus = Bus::connect(&config.nats, &config.streams, node.as_str(), clock.clone()).await?;
    bus.ensure_streams().await?;
    let jobs = match roles.preprocess && (roles.schedule || roles.execute) {
        true => Some(bus.beside(&config.nats, &format!("{node}-jobs")).await?),
        false => None,
    };
    let pages = if roles.preprocess {
        let limits = PagerLimits {
            ram_bytes: config.pager.ram_bytes,
            disk_bytes: config.pager.disk_bytes,
            spill_root: config.pager.dir.clone(),
            lease: config.pager.lease,
        };
        Some(Arc::new(PageStore::open(node.clone(), limits).context("[pager] dir")?))
    } else {
        None
    };
    Ok(Shared {
        config,
        bus,
        jobs,
        clock,
        health: Health::new(),
        registry,
        intake: DrainGate::new(),
        running: DrainGate::new(),
        devices: DrainGate::new(),
        fatal,
        pages,
        node,
    })
}

/// Stops taking work, lets what runs end, in the order in which it flows. A second signal ends the wait.
async fn drain(shared: &Shared, roles: Roles, signals: &mut StopSignals) {
    let timeout = shared.config.drain.timeout;
    tracing::info!(timeout_secs = timeout.as_secs(), "draining");
    shared.health.set_not_ready("drain", "this process is ending");
    let flow = async {
        shared.intake.start_draining();
        shared.intake.wait_idle(timeout).await;
        shared.running.start_draining();
        shared.running.wait_idle(timeout).await;
        // Executors elsewhere may still read the pages of jobs that were handed over.
        while !roles.schedule && shared.pages.as_ref().is_some_and(|pages| pages.counters().pages > 0) {
            tokio::time::sleep(PAGES_LOOK).await;
        }
    };
    tokio::select! {
        drained = tokio::time::timeout(timeout, flow) => {
            if drained.is_err() {
                tracing::warn!("not everything ended in time; the rest is delivered again elsewhere");
            }
        }
        () = signals.next() => tracing::warn!("second signal: ending at once"),
    }
}

/// Makes the process known to `$SRV.PING`, one service a role.
async fn register(shared: &Shared, roles: Roles) -> Result<Vec<ServiceHandle>> {
    let mut services = Vec::new();
    for role in roles.names() {
        let models: Vec<&str> = shared.config.models.iter().map(|model| model.name.as_str()).collect();
        let metadata =
            BTreeMap::from([("node".to_owned(), shared.node.to_string()), ("models".to_owned(), models.join(","))]);
        let name = format!("millrace-{role}");
        services.push(shared.bus.register_service(&name, env!("CARGO_PKG_VERSION"), role, metadata).await?);
    }
    Ok(services)
}

/// The actix system with its actors, on threads of its own. Dropping it ends the actors at once.
struct Actors {
    stop: Option<oneshot::Sender<()>>,
    ended: oneshot::Receiver<()>,
}

impl Actors {
    async fn start(shared: Shared, roles: Roles) -> Result<Self> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (started, result) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        std::thread::Builder::new().name("actors".into()).spawn(move || {
            let system = actix::System::new();
            system.block_on(async move {
                let actors = roles::start(shared, roles).await;
                let failed = actors.is_err();
                // Nobody waits any more if the caller was dropped; then `stopped` ends at once as well.
                let _ = started.send(actors.map(drop));
                if failed {
                    // Actors that were created before the fault must have started before the system goes away.
                    tokio::task::yield_now().await;
                } else {
                    let _ = stopped.await;
                }
            });
            let _ = end.send(());
        })?;
        result.await.map_err(|_| anyhow!("the actors' thread ended while it started"))??;
        Ok(Self { stop: Some(stop), ended })
    }

    async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        let _ = (&mut self.ended).await;
    }
}
