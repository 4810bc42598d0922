//! A running Millrace as a client sees it: publish, follow, cancel, store media, ask who is there. The only file of this
//! crate, beside `compose`, that calls the bus.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use futures::stream::{self, LocalBoxStream, StreamExt};
use millrace_bus::{Bus, BusError, Follow};
use millrace_config::{Config, NatsUrl};
use millrace_protocol::engine::SchedulerBeacon;
use millrace_protocol::{Class, JobId, JobRequest, ModelName, OutputChunk};
use millrace_runtime::Clock;

use crate::exit::unavailable;
use crate::upload;

/// Beacons that may wait to be read.
const BEACONS: usize = 256;
/// Silence of a job's output after which it is asked whether anybody serves its model.
const QUIET: Duration = Duration::from_secs(10);
/// Longest wait for acknowledgements when a service in this process ends.
const SETTLE: Duration = Duration::from_secs(2);
/// Times in a row that nobody may serve it before the reader gives up.
const PATIENCE: u32 = 3;

/// A connection to the service.
#[derive(Clone)]
pub struct Service {
    bus: Bus,
}

impl Service {
    /// Connects as the configuration says; that may start a managed NATS server, which [`Service::close`] ends.
    ///
    /// # Errors
    /// An unavailable server, with what to do.
    pub async fn connect(config: &Config, name: &str) -> anyhow::Result<Self> {
        let bus = Bus::connect(&config.nats, &config.streams, name, Clock::system()).await;
        let bus = bus.map_err(|error| unavailable(error.to_string()))?;
        // A client may be the first to come, and a managed server starts empty.
        if let Err(error) = bus.ensure_streams().await {
            bus.shutdown().await;
            return Err(unavailable(error.to_string()));
        }
        Ok(Self { bus })
    }

    /// Connects to a server that runs already: a client of nobody is of no use.
    ///
    /// # Errors
    /// An unavailable server, with what to do.
    pub async fn connect_to_running(config: &Config, name: &str) -> anyhow::Result<Self> {
        const NOBODY: &str = "no NATS server runs on this machine; start `millrace up`, or give --nats URL";
        let mut nats = config.nats.clone();
        if nats.url == NatsUrl::Managed {
            // The serving process manages it; here it is one that runs.
            nats.url = NatsUrl::Auto;
        }
        match Bus::connect(&nats, &config.streams, name, Clock::system()).await {
            Ok(bus) if bus.managed_server().is_some() => {
                bus.shutdown().await;
                Err(unavailable(NOBODY))
            }
            Ok(bus) => Ok(Self { bus }),
            Err(BusError::ServerMissing { .. } | BusError::ServerStart { .. }) => Err(unavailable(NOBODY)),
            Err(error) => Err(unavailable(format!("{error}; check --nats or [nats] url"))),
        }
    }

    /// The connection, for commands that look at more than jobs.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Address of the server.
    pub fn url(&self) -> &str {
        self.bus.url()
    }

    /// Whether this process started the server, so that nobody else can be there.
    pub fn manages_server(&self) -> bool {
        self.bus.managed_server().is_some()
    }

    /// The models for which a scheduler with an engine takes jobs now. Listens for `window`, shorter if `until` is there.
    ///
    /// # Errors
    /// The bus's.
    pub async fn served_models(&self, window: Duration, until: Option<&ModelName>) -> anyhow::Result<Vec<ModelName>> {
        let mut beacons = self.bus.subscribe(&self.bus.subjects().scheduler_beacons(), BEACONS, None).await?;
        let mut models: Vec<ModelName> = Vec::new();
        let _window_over = tokio::time::timeout(window, async {
            while let Some(message) = beacons.next().await {
                let Some(model) = ready_model(&message.payload) else { continue };
                let found = until == Some(&model);
                if !models.contains(&model) {
                    models.push(model);
                }
                if found {
                    return;
                }
            }
        })
        .await;
        models.sort();
        Ok(models)
    }

    /// Waits until a scheduler with an engine takes jobs for `model`.
    ///
    /// # Errors
    /// The bus's.
    pub async fn wait_for(&self, model: &ModelName) -> anyhow::Result<()> {
        let mut beacons = self.bus.subscribe(&self.bus.subjects().scheduler_beacons(), BEACONS, None).await?;
        while let Some(message) = beacons.next().await {
            if ready_model(&message.payload).as_ref() == Some(model) {
                return Ok(());
            }
        }
        Err(unavailable("the connection to NATS closed"))
    }

    /// Stores a job in the queue.
    ///
    /// # Errors
    /// The bus's: too large, queue full, no answer.
    pub async fn publish(
        &self,
        class: Class,
        model: &ModelName,
        job: &JobId,
        request: &JobRequest,
    ) -> anyhow::Result<()> {
        self.publish_document(class, model, job, serde_json::to_vec(request)?).await
    }

    /// As [`Service::publish`], with the document as it was written.
    ///
    /// # Errors
    /// As [`Service::publish`].
    pub async fn publish_document(
        &self,
        class: Class,
        model: &ModelName,
        job: &JobId,
        document: Vec<u8>,
    ) -> anyhow::Result<()> {
        let published = self.bus.publish_job(class, model, job, Bytes::from(document)).await?;
        if published.duplicate {
            tracing::info!(%job, "the queue had a job of this id already; this one was not stored");
        }
        Ok(())
    }

    /// A job's output from its start to its final, or to the first fault. With `model`, nobody serving that model for
    /// half a minute is a fault; without, this waits for as long as it takes.
    pub fn follow(
        &self,
        job: &JobId,
        model: Option<&ModelName>,
    ) -> LocalBoxStream<'static, anyhow::Result<OutputChunk>> {
        let reader = Reader { service: self.clone(), job: job.clone(), model: model.cloned(), follow: None };
        stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            let chunk = reader.next().await.transpose()?;
            let rest = chunk.is_ok().then_some(reader);
            Some((chunk, rest))
        })
        .boxed_local()
    }

    /// The newest chunk of a job's output.
    ///
    /// # Errors
    /// The bus's.
    pub async fn last_chunk(&self, job: &JobId) -> anyhow::Result<Option<OutputChunk>> {
        Ok(self.bus.out_last(job).await?.map(|(_, chunk)| chunk))
    }

    /// Puts a file into the media bucket under a name made of its content, unless it is there. `progress` hears of every
    /// piece, in bytes. Returns the name.
    ///
    /// # Errors
    /// The file's or the bus's.
    pub async fn put_media(&self, path: &Path, progress: impl Fn(u64) + Unpin) -> anyhow::Result<String> {
        let name = upload::content_name(path).await.with_context(|| format!("cannot read {}", path.display()))?;
        // Reading at most 0 bytes tells whether it is there: too large, or missing.
        if matches!(self.bus.object_get(&name, 0).await, Err(BusError::TooLarge { .. })) {
            return Ok(name);
        }
        let file = tokio::fs::File::open(path).await?;
        self.bus.object_put(&name, upload::Counting::new(file, progress)).await?;
        Ok(name)
    }

    /// Cancels a job, wherever it is.
    ///
    /// # Errors
    /// The bus's.
    pub async fn cancel(&self, job: &JobId) -> anyhow::Result<()> {
        Ok(self.bus.cancel(job).await?)
    }

    /// Waits until the queue has forgotten every job that somebody works on, at most [`SETTLE`]: a final is shown before
    /// its job is acknowledged, and a service that ends in between leaves the job to be delivered again.
    pub async fn settle(&self) {
        let settled = async {
            while let Ok(consumers) = self.bus.consumer_status().await
                && consumers.iter().any(|consumer| consumer.ack_pending > 0)
            {
                tokio::time::sleep(SETTLE / 40).await;
            }
        };
        // What does not settle is delivered again: that is what the queue is for.
        let _ = tokio::time::timeout(SETTLE, settled).await;
    }

    /// Closes the connection, and the managed server if this process started one.
    pub async fn close(&self) {
        self.bus.shutdown().await;
    }
}

fn ready_model(beacon: &[u8]) -> Option<ModelName> {
    let beacon: SchedulerBeacon = serde_json::from_slice(beacon).ok()?;
    (beacon.engine.is_some() && !beacon.draining).then_some(beacon.model)
}

/// Follows one job and notices when nobody works on it any more.
struct Reader {
    service: Service,
    job: JobId,
    model: Option<ModelName>,
    follow: Option<Follow>,
}

impl Reader {
    async fn next(&mut self) -> anyhow::Result<Option<OutputChunk>> {
        let follow = match &mut self.follow {
            Some(follow) => follow,
            closed => closed.insert(self.service.bus.follow(&self.job, 0).await?),
        };
        let mut missed = 0;
        loop {
            if let Ok(next) = tokio::time::timeout(QUIET, follow.next()).await {
                return Ok(next.transpose()?.map(|(_, chunk)| chunk));
            }
            let Some(model) = &self.model else { continue };
            let served = self.service.served_models(QUIET / 10, Some(model)).await.is_ok_and(|all| all.contains(model));
            missed = if served { 0 } else { missed + 1 };
            if missed >= PATIENCE {
                let (job, url) = (&self.job, self.service.url());
                return Err(unavailable(format!(
                    "nobody serves `{model}` at {url} any more; job {job} stays queued: `millrace result {job} --follow`"
                )));
            }
        }
    }
}
