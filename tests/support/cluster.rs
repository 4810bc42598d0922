//! A NATS server of its own for one test, a configuration for `millrace` processes on it, and a publisher's view of both.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use millrace_bus::{Bus, Published};
use millrace_config::{Config, Environment, NatsUrl};
use millrace_protocol::{Chunk, Class, Final, JobId, JobRequest, ModelName, OutputChunk};
use millrace_runtime::Clock;
use tempfile::TempDir;
use tokio::time::timeout;

use crate::service::Service;
use crate::workspace::root;

/// Longest wait for one job's end. Generous: CI has two cores and runs tests side by side.
pub const JOB_PATIENCE: Duration = Duration::from_secs(120);
/// Name under which tests serve the demo checkpoint.
pub const MODEL: &str = "demo";

/// A server, a configuration and a connection. The server ends with it.
pub struct Cluster {
    folder: TempDir,
    /// The tests' own connection, which also owns the server.
    pub bus: Bus,
    model: PathBuf,
}

impl Cluster {
    /// Starts a server that serves the demo checkpoint's model.
    ///
    /// # Errors
    /// If no nats-server is installed (./tests/run.sh installs it) or it does not start.
    pub async fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut config = Config::parse(&toml(folder.path(), "managed", Path::new("unused")), &Environment::read())?;
        config.nats.url = NatsUrl::Managed;
        let bus = Bus::connect(&config.nats, &config.streams, "tests", Clock::system()).await?;
        bus.ensure_streams().await?;
        Ok(Self { folder, bus, model: root().join("deploy/demo/model") })
    }

    /// Writes the configuration of the processes, `extra` appended, and returns its path.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn config(&self, name: &str, extra: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(format!("{name}.toml"));
        let text = toml(&self.folder.path().join(name), self.bus.url(), &self.model);
        std::fs::write(&path, format!("{text}\n{extra}"))?;
        Ok(path)
    }

    /// Starts one `millrace` process with the plain configuration.
    ///
    /// # Errors
    /// If it does not get ready.
    pub async fn run(&self, role: &str) -> Result<Service> {
        Service::start(&[role], &self.config(role, "")?).await
    }

    /// Publishes a job under `id`.
    ///
    /// # Errors
    /// If the queue refuses it.
    pub async fn publish(&self, id: &str, request: &JobRequest) -> Result<Published> {
        self.publish_raw(Class::Interactive, MODEL, id, serde_json::to_vec(request)?.into()).await
    }

    /// Publishes any bytes as a job.
    ///
    /// # Errors
    /// If the queue refuses them.
    pub async fn publish_raw(&self, class: Class, model: &str, id: &str, body: Bytes) -> Result<Published> {
        Ok(self.bus.publish_job(class, &ModelName::new(model)?, &JobId::new(id)?, body).await?)
    }

    /// Waits for a job's end and returns everything stored for it, checked for gaps and repeats.
    ///
    /// # Errors
    /// If it does not end in time, or its output breaks a promise.
    pub async fn finished(&self, id: &str) -> Result<(Final, Vec<OutputChunk>)> {
        let job = JobId::new(id)?;
        let mut follow = self.bus.follow(&job, 0).await?;
        let mut chunks = Vec::new();
        let all = async {
            while let Some(next) = follow.next().await {
                chunks.push(next?.1);
            }
            anyhow::Ok(())
        };
        timeout(JOB_PATIENCE, all).await.with_context(|| format!("job {id} did not end"))??;
        let last = check(&chunks).with_context(|| format!("job {id}"))?;
        Ok((last, chunks))
    }

    /// Jobs that the queue still holds.
    ///
    /// # Errors
    /// If the server does not answer.
    pub async fn queued(&self) -> Result<u64> {
        let jobs = self.bus.subjects().jobs_stream();
        let streams = self.bus.stream_status().await?;
        Ok(streams.iter().find(|stream| stream.name == jobs).context("no work queue")?.messages)
    }
}

/// The promises about a job's output: indexes without gap or repeat, one final message and nothing behind it, and the final
/// text begins with what was shown.
fn check(chunks: &[OutputChunk]) -> Result<Final> {
    let mut shown = String::new();
    let mut tokens: Vec<u32> = Vec::new();
    let mut last = None;
    for chunk in chunks {
        ensure!(last.is_none(), "a chunk follows the final one: {chunk:?}");
        ensure!(chunk.index == tokens.len() as u64, "index {} after {} tokens", chunk.index, tokens.len());
        match &chunk.chunk {
            Chunk::Claim { .. } => {}
            Chunk::Delta { token_ids, text, .. } => {
                tokens.extend(token_ids);
                shown.push_str(text);
            }
            Chunk::Final(end) => last = Some(end.as_ref().clone()),
        }
    }
    let last = last.context("no final message")?;
    ensure!(
        last.text.starts_with(&shown),
        "the final text {:?} does not begin with what was shown: {shown:?}",
        last.text
    );
    ensure!(last.token_ids.starts_with(&tokens), "the final tokens do not begin with those shown");
    Ok(last)
}

fn toml(state: &Path, url: &str, model: &Path) -> String {
    format!(
        r#"
[nats]
url = "{url}"
store_dir = "{state}/nats"

[streams]
ack_wait = "3s"
duplicate_window = "60s"

[[models]]
name = "{MODEL}"
path = "{model}"
default = true

[pager]
dir = "{state}/pages"

[executor]
kv_bytes = "64MiB"

[telemetry]
listen = "127.0.0.1:0"
log_format = "json"

[drain]
timeout = "30s"
"#,
        state = state.display(),
        model = model.display(),
    )
}
