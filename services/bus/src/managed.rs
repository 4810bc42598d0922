//! A `nats-server` child for machines that have none: found, checked, started, restarted if it dies, and stopped with us.
//! Must not decide whether one is wanted.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use millrace_config::Nats;
use millrace_runtime::{Backoff, BackoffPolicy, Clock};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::errors::BusError;
use crate::server_config;

/// Oldest server whose work queues keep what they promise, as text.
pub const MIN_VERSION_TEXT: &str = "2.15.1";
const MIN_VERSION: [u64; 3] = [2, 15, 1];
/// Longest wait for the server to listen; a large store takes a while to read.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for an orderly end before the child is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);
/// Lines of the server's log kept for error messages.
const LAST_WORDS: usize = 8;
const RESTART: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
    healthy_after: Duration::from_secs(30),
};

/// How to start a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagedOptions {
    /// Binary; `None`: `nats-server` through PATH.
    pub binary: Option<PathBuf>,
    /// Folder for streams and the server's own files. One server at a time uses it.
    pub store_dir: PathBuf,
    /// Largest message, headers included, in bytes.
    pub max_payload_bytes: u64,
    /// Most bytes of all streams together; `None`: most of the free disk.
    pub max_store_bytes: Option<u64>,
}

impl ManagedOptions {
    /// As `[nats]` says.
    pub fn from_config(nats: &Nats) -> Self {
        Self {
            binary: nats.server_path.clone(),
            store_dir: nats.store_dir.clone(),
            max_payload_bytes: nats.max_payload_bytes,
            max_store_bytes: None,
        }
    }
}

/// A running child. It is killed when this is dropped; [`ManagedServer::stop`] ends it in order.
#[derive(Debug)]
pub struct ManagedServer {
    url: String,
    pid: Arc<AtomicU32>,
    restarts: Arc<AtomicU32>,
    stop: watch::Sender<bool>,
    stopped: watch::Receiver<bool>,
    keeper: JoinHandle<()>,
}

impl ManagedServer {
    /// Starts a server on a free loopback port, and starts it again on the same port whenever it dies.
    ///
    /// # Errors
    /// [`BusError::ServerMissing`] says how to get one, [`BusError::Unsuitable`] that it is too old,
    /// [`BusError::ServerStart`] carries its last words.
    pub async fn start(options: &ManagedOptions) -> Result<Self, BusError> {
        let binary = options.binary.clone().unwrap_or_else(|| PathBuf::from("nats-server"));
        check_version(&binary).await?;
        let lock = server_config::lock_folder(&options.store_dir)?;
        let mut launch = Launch { binary, options: options.clone(), port: None, lock };
        let (child, url) = launch.start().await?;
        launch.port = url.rsplit(':').next().and_then(|port| port.parse().ok());
        server_config::record_url(&options.store_dir, &url)?;
        let pid = Arc::new(AtomicU32::new(child.id().unwrap_or(0)));
        let restarts = Arc::new(AtomicU32::new(0));
        let (stop, stop_asked) = watch::channel(false);
        let (gone, stopped) = watch::channel(false);
        let keeper = Keeper { launch, pid: Arc::clone(&pid), restarts: Arc::clone(&restarts), stop: stop_asked, gone };
        let keeper = tokio::spawn(keeper.run(child));
        Ok(Self { url, pid, restarts, stop, stopped, keeper })
    }

    /// Where it listens; the same after a restart.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Process id; `None` between its death and its restart.
    pub fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::SeqCst)).filter(|pid| *pid != 0)
    }

    /// Times it was started again.
    pub fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::SeqCst)
    }

    /// Ends the server in order (it writes its state), or kills it after ten seconds.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        // An error means that the keeper is gone, and with it the child.
        let _ = self.stopped.clone().wait_for(|gone| *gone).await;
    }
}

impl Drop for ManagedServer {
    fn drop(&mut self) {
        self.keeper.abort();
        if let Some(pid) = self.pid() {
            signal(pid, Signal::SIGKILL);
        }
    }
}

/// Whether a version text such as `2.15.1` or `v2.15.1-RC.1` is recent enough.
pub(crate) fn new_enough(version: &str) -> bool {
    let numbers: Vec<u64> = version
        .trim_start_matches('v')
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse().ok())
        .take(3)
        .collect();
    numbers.as_slice() >= MIN_VERSION.as_slice()
}

/// The address of a server that an earlier process started in this folder; it need not run any more.
pub(crate) fn recorded_url(store_dir: &Path) -> Option<String> {
    server_config::recorded_url(store_dir)
}

async fn check_version(binary: &Path) -> Result<(), BusError> {
    let output = Command::new(binary).arg("-v").stdin(Stdio::null()).output().await;
    let output = output.map_err(|error| BusError::ServerMissing { tried: format!("{}: {error}", binary.display()) })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.trim().rsplit(' ').next().unwrap_or_default();
    if new_enough(version) {
        return Ok(());
    }
    Err(BusError::Unsuitable {
        url: binary.display().to_string(),
        reason: format!("`-v` says `{}`, and work queues are safe from {MIN_VERSION_TEXT} on", text.trim()),
    })
}

fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        // An error means that it is gone already.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Everything needed to start the server, also again.
struct Launch {
    binary: PathBuf,
    options: ManagedOptions,
    port: Option<u16>,
    lock: std::fs::File,
}

impl Launch {
    /// Starts the child and waits until it listens; returns its address.
    async fn start(&self) -> Result<(Child, String), BusError> {
        let config = server_config::write(&self.options, self.port)?;
        let failed = |error: std::io::Error| BusError::ServerStart { message: error.to_string() };
        // The child inherits the folder's lock: a server that outlives a killed owner keeps its folder to itself.
        let lock = self.lock.try_clone().map_err(failed)?;
        let mut child = Command::new(&self.binary)
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::from(lock))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Its own group: Ctrl-C reaches us first, and we stop it after the jobs have drained.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| BusError::ServerStart { message: format!("{}: {error}", self.binary.display()) })?;
        let words = child.stderr.take().map(LastWords::listen);
        match tokio::time::timeout(START_TIMEOUT, self.listening(&mut child)).await {
            Ok(Ok(url)) => Ok((child, url)),
            Ok(Err(message)) => {
                let said = match words {
                    Some(words) => words.text().await,
                    None => String::new(),
                };
                Err(BusError::ServerStart { message: format!("{message}\n{said}") })
            }
            Err(_elapsed) => Err(BusError::ServerStart { message: "it did not listen in time".into() }),
        }
    }

    async fn listening(&self, child: &mut Child) -> Result<String, String> {
        let pid = child.id().unwrap_or(0);
        loop {
            if let Some(url) = server_config::ports(&self.options.store_dir, pid) {
                return Ok(url);
            }
            tokio::select! {
                status = child.wait() => {
                    return Err(status.map_or_else(|error| error.to_string(), |status| format!("it ended with {status}")));
                }
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }
}

/// The last lines of the server's log.
struct LastWords(JoinHandle<Vec<String>>);

impl LastWords {
    fn listen(stderr: ChildStderr) -> Self {
        Self(tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).lines();
            let mut last = Vec::new();
            while let Ok(Some(line)) = lines.next_line().await {
                tracing::debug!(target: "nats_server", "{line}");
                last.push(line);
                if last.len() > LAST_WORDS {
                    last.remove(0);
                }
            }
            last
        }))
    }

    async fn text(self) -> String {
        self.0.await.unwrap_or_default().join("\n")
    }
}

/// Waits for the child's end, wanted or not.
struct Keeper {
    launch: Launch,
    pid: Arc<AtomicU32>,
    restarts: Arc<AtomicU32>,
    stop: watch::Receiver<bool>,
    gone: watch::Sender<bool>,
}

impl Keeper {
    async fn run(mut self, mut child: Child) {
        let (mut backoff, clock) = (Backoff::new(RESTART), Clock::system());
        loop {
            let started = clock.now();
            tokio::select! {
                status = child.wait() => {
                    self.pid.store(0, Ordering::SeqCst);
                    tracing::error!(?status, "the managed nats-server died; starting it again");
                }
                _ = self.stop.wait_for(|stop| *stop) => break,
            }
            if clock.now() - started >= RESTART.healthy_after {
                backoff.reset();
            }
            child = loop {
                tokio::select! {
                    () = tokio::time::sleep(backoff.next_delay()) => {}
                    _ = self.stop.wait_for(|stop| *stop) => {
                        self.gone.send_replace(true);
                        return;
                    }
                }
                match self.launch.start().await {
                    Ok((child, _url)) => break child,
                    Err(error) => tracing::error!(%error, "the managed nats-server does not start again"),
                }
            };
            self.pid.store(child.id().unwrap_or(0), Ordering::SeqCst);
            self.restarts.fetch_add(1, Ordering::SeqCst);
        }
        if let Some(pid) = child.id() {
            signal(pid, Signal::SIGTERM);
        }
        if tokio::time::timeout(STOP_TIMEOUT, child.wait()).await.is_err() {
            tracing::warn!("the managed nats-server did not end in time and is killed");
            let _ = child.kill().await;
        }
        self.pid.store(0, Ordering::SeqCst);
        self.gone.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        for good in ["2.15.1", "v2.15.1", "2.15.10", "2.16.0", "3.0.0", "2.15.1-RC.2"] {
            assert!(new_enough(good), "{good}");
        }
        for bad in ["2.15.0", "2.9.10", "2.15", "1.99.99", "", "latest", "v"] {
            assert!(!new_enough(bad), "{bad}");
        }
    }
}
