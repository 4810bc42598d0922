//! A server and a bus per test. Must not hide what a test is about.

use std::future::Future;
use std::time::Duration;

use millrace_bus::{Bus, ManagedOptions, ManagedServer};
use millrace_config::{Config, Environment, Nats, NatsUrl, Streams};
use millrace_protocol::{Class, JobId, ModelName};
use millrace_runtime::Clock;

/// A server in a folder of its own; both end with this value.
pub struct Server {
    pub managed: ManagedServer,
    _dir: tempfile::TempDir,
}

/// Small limits, so that several servers fit the test machine.
pub fn streams() -> Streams {
    Streams {
        jobs_max_bytes: 8 << 20,
        jobs_max_messages: 1_000,
        job_max_bytes: 256 << 10,
        out_max_bytes: 8 << 20,
        dlq_max_bytes: 1 << 20,
        media_max_bytes: 16 << 20,
        ..Config::default().streams
    }
}

/// Options for a server in `dir`. Without a binary its start fails with the sentence that says how to get one.
pub fn options(dir: &std::path::Path) -> ManagedOptions {
    ManagedOptions {
        binary: Environment::read().nats_server,
        store_dir: dir.to_path_buf(),
        max_payload_bytes: 1 << 20,
        max_store_bytes: Some(1 << 30),
    }
}

pub async fn server() -> Server {
    let dir = tempfile::tempdir().unwrap();
    let managed = match ManagedServer::start(&options(dir.path())).await {
        Ok(managed) => managed,
        Err(error) => panic!("{error}"),
    };
    Server { managed, _dir: dir }
}

pub fn nats(url: &str) -> Nats {
    Nats { url: NatsUrl::Url(url.into()), request_timeout: Duration::from_secs(10), ..Config::default().nats }
}

impl Server {
    /// A connection; streams are left alone.
    pub async fn connect(&self, streams: &Streams) -> Bus {
        Bus::connect(&nats(self.managed.url()), streams, "test", Clock::system()).await.unwrap()
    }

    /// A connection with streams in place.
    pub async fn bus(&self, streams: &Streams) -> Bus {
        let bus = self.connect(streams).await;
        bus.ensure_streams().await.unwrap();
        bus
    }
}

/// Fails the test instead of hanging it.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("took longer than 30 s")
}

pub fn job(name: &str) -> JobId {
    JobId::new(name).unwrap()
}

pub fn model() -> ModelName {
    ModelName::new("demo").unwrap()
}

/// Publishes a job of the batch class.
pub async fn publish(bus: &Bus, name: &str) -> millrace_bus::Published {
    bus.publish_job(Class::Batch, &model(), &job(name), r#"{"prompt":"Hi"}"#.into()).await.unwrap()
}
