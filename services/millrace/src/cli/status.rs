//! `millrace status`: who is there, what they can take, and how full the streams are.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use millrace_bus::{Bus, ConsumerStatus, ServiceInfo, StreamStatus};
use millrace_protocol::engine::{ExecutorBeacon, SchedulerBeacon};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::settings::SettingsArgs;
use crate::exit::unavailable;
use crate::service::Service;
use crate::status_table;

/// Longer than two beacons apart, and enough for every service to answer.
const LISTEN: Duration = Duration::from_millis(700);

/// Options of `millrace status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// One JSON document
    #[arg(long)]
    pub json: bool,
}

/// What there is.
pub struct Snapshot {
    /// Address of the server.
    pub nats: String,
    /// Who answers `$SRV.INFO`.
    pub services: Vec<ServiceInfo>,
    /// Schedulers, by id.
    pub schedulers: Vec<SchedulerBeacon>,
    /// Executors, by id.
    pub executors: Vec<ExecutorBeacon>,
    /// Streams and buckets.
    pub streams: Vec<StreamStatus>,
    /// The work queue's consumers.
    pub consumers: Vec<ConsumerStatus>,
}

/// Prints a snapshot.
///
/// # Errors
/// An unavailable server, or one without Millrace's streams.
pub async fn run(settings: &SettingsArgs, args: StatusArgs) -> anyhow::Result<ExitCode> {
    let service = Service::connect_to_running(&settings.load()?, "millrace status").await?;
    let snapshot = snapshot(service.bus()).await;
    service.close().await;
    let snapshot = snapshot?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&json_of(&snapshot))?)?;
    } else {
        out.write_all(status_table::text(&snapshot).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn snapshot(bus: &Bus) -> anyhow::Result<Snapshot> {
    let subjects = bus.subjects();
    let (scheduler_subject, executor_subject) = (subjects.scheduler_beacons(), subjects.executor_beacons());
    let (services, schedulers, executors) =
        tokio::try_join!(bus.discover(LISTEN), beacons(bus, &scheduler_subject), beacons(bus, &executor_subject),)?;
    let nobody = |error| unavailable(format!("{}: {error}; has `millrace up` run there?", bus.url()));
    let streams = bus.stream_status().await.map_err(nobody)?;
    let consumers = bus.consumer_status().await.map_err(nobody)?;
    Ok(Snapshot {
        nats: bus.url().to_string(),
        services,
        schedulers: newest(schedulers, |beacon: &SchedulerBeacon| beacon.scheduler.to_string()),
        executors: newest(executors, |beacon: &ExecutorBeacon| beacon.executor.to_string()),
        streams,
        consumers,
    })
}

/// Beacons of one kind, as many as come in the time.
async fn beacons<T: DeserializeOwned>(bus: &Bus, subject: &str) -> Result<Vec<T>, millrace_bus::BusError> {
    let mut subscription = bus.subscribe(subject, 1024, None).await?;
    let mut found = Vec::new();
    let _window_over = tokio::time::timeout(LISTEN, async {
        while let Some(message) = subscription.next().await {
            found.extend(serde_json::from_slice::<T>(&message.payload));
        }
    })
    .await;
    Ok(found)
}

/// The last beacon of each sender.
fn newest<T>(beacons: Vec<T>, id: impl Fn(&T) -> String) -> Vec<T> {
    let by_id: std::collections::BTreeMap<String, T> =
        beacons.into_iter().map(|beacon| (id(&beacon), beacon)).collect();
    by_id.into_values().collect()
}

fn json_of(snapshot: &Snapshot) -> Value {
    let service = |info: &ServiceInfo| json!({ "name": info.name, "id": info.id, "version": info.version, "metadata": info.metadata });
    let stream = |stream: &StreamStatus| {
        json!({ "name": stream.name, "messages": stream.messages, "bytes": stream.bytes,
            "max_bytes": stream.max_bytes, "last_seq": stream.last_seq })
    };
    let consumer = |consumer: &ConsumerStatus| {
        json!({ "class": consumer.class, "name": consumer.name, "pending": consumer.pending,
            "ack_pending": consumer.ack_pending, "redelivered": consumer.redelivered,
            "waiting_pulls": consumer.waiting_pulls })
    };
    json!({
        "nats": snapshot.nats,
        "services": snapshot.services.iter().map(service).collect::<Vec<_>>(),
        "schedulers": snapshot.schedulers,
        "executors": snapshot.executors,
        "streams": snapshot.streams.iter().map(stream).collect::<Vec<_>>(),
        "consumers": snapshot.consumers.iter().map(consumer).collect::<Vec<_>>(),
    })
}
