//! Real `millrace` processes for end-to-end tests: started with a configuration of their own, ready when they say so,
//! killed when dropped.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Longest wait for a process to say that it is ready, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// The `millrace` binary of this build.
///
/// # Errors
/// If it was not built; `tests/run.sh` builds it first.
pub fn binary() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test.parent().and_then(Path::parent).context("test executable without a target folder")?;
    let binary = folder.join("millrace");
    ensure!(binary.exists(), "{} is missing: run `cargo build -p millrace` or ./tests/run.sh", binary.display());
    Ok(binary)
}

/// A running `millrace` process.
pub struct Service {
    child: Child,
    said: JoinHandle<Vec<String>>,
    /// Where /metrics and /readyz are.
    pub admin: SocketAddr,
    /// The NATS server it uses.
    pub nats_url: String,
}

impl Service {
    /// Starts `millrace ARGS --config FILE` and waits until it logs that it is ready.
    ///
    /// # Errors
    /// If it ends or stays silent; the error holds what it printed.
    pub async fn start(args: &[&str], config: &Path) -> Result<Self> {
        let mut child = Command::new(binary()?)
            .args(args)
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(child.stderr.take().context("no stderr")?).lines();
        let mut seen = String::new();
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if let Some(ready) = Ready::read(&line) {
                    return Ok(ready);
                }
                seen.push_str(&line);
                seen.push('\n');
            }
            bail!("it ended")
        };
        let ready = timeout(PATIENCE, ready).await.context("not ready in time").and_then(|ready| ready);
        let ready = ready.with_context(|| format!("millrace {args:?} printed:\n{seen}"))?;
        // The pipe must be emptied, or a talkative process blocks on it; what it says goes into the test's own output.
        let said = tokio::spawn(async move {
            let mut said = Vec::new();
            while let Ok(Some(line)) = lines.next_line().await {
                eprintln!("{line}");
                said.push(line);
            }
            said
        });
        Ok(Self { child, said, admin: ready.admin, nats_url: ready.nats })
    }

    /// Asks it to drain (SIGTERM) and waits for its exit code.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn terminate(self) -> Result<i32> {
        Ok(self.last_words().await?.0)
    }

    /// As [`Self::terminate`], with the lines it logged since it was ready.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn last_words(mut self) -> Result<(i32, Vec<String>)> {
        self.signal(Signal::SIGTERM)?;
        let status = timeout(PATIENCE, self.child.wait()).await.context("did not end after SIGTERM")??;
        Ok((status.code().context("ended by a signal")?, self.said.await?))
    }

    /// Ends it at once (SIGKILL).
    ///
    /// # Errors
    /// If it is gone already.
    pub async fn kill(mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If it is gone already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = self.child.id().context("already ended")?;
        Ok(kill(Pid::from_raw(i32::try_from(id)?), signal)?)
    }

    /// GET on the admin endpoint: status code and body.
    ///
    /// # Errors
    /// If the endpoint does not answer with HTTP.
    pub async fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(self.admin).await?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP header")?;
        let code = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((code, body.to_owned()))
    }

    /// Value of the first sample of `family` whose labels contain `labels`, 0 if there is none.
    ///
    /// # Errors
    /// If /metrics cannot be read.
    pub async fn metric(&self, family: &str, labels: &str) -> Result<f64> {
        let (_, text) = self.get("/metrics").await?;
        let line = text.lines().find(|line| {
            let name = line.split([' ', '{']).next().unwrap_or_default();
            name == family && line.contains(labels)
        });
        Ok(line.and_then(|line| line.rsplit(' ').next()).map_or(Ok(0.0), str::parse)?)
    }
}

/// The line by which a process says that it is ready (JSON log form).
struct Ready {
    admin: SocketAddr,
    nats: String,
}

impl Ready {
    fn read(line: &str) -> Option<Self> {
        let fields: serde_json::Value = serde_json::from_str(line).ok()?;
        (fields.get("message")?.as_str()? == "ready").then_some(())?;
        let admin = fields.get("admin")?.as_str()?.parse().ok()?;
        Some(Self { admin, nats: fields.get("nats")?.as_str()?.to_owned() })
    }
}
