//! Processes that manage their NATS server end with it, whenever they are told to, and have nothing to complain of.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use millrace_tests::service::{Service, binary};
use millrace_tests::workspace::root;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::timeout;

/// Longest wait for a server to come or go.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(state: &Path) -> Result<PathBuf> {
    let (path, place, model) = (state.join("pipeline.toml"), state.display(), root().join("deploy/demo/model"));
    let text = format!(
        "[nats]\nurl = \"managed\"\nstore_dir = \"{place}/nats\"\n[pager]\ndir = \"{place}/pages\"\n\
         [[models]]\nname = \"demo\"\npath = \"{}\"\ndefault = true\n[executor]\nkv_bytes = \"64MiB\"\n\
         [telemetry]\nlisten = \"127.0.0.1:0\"\nlog_format = \"json\"\n",
        model.display()
    );
    std::fs::write(&path, text)?;
    Ok(path)
}

/// Waits until nothing listens at `url` any more.
async fn gone(url: &str) -> Result<()> {
    let address = url.trim().trim_start_matches("nats://");
    let refused = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, refused).await.with_context(|| format!("a server is left at {url}"))
}

#[tokio::test]
async fn an_ordinary_end_takes_the_server_along_and_warns_of_nothing() -> Result<()> {
    let state = tempfile::tempdir()?;
    let service = Service::start(&["up"], &config(state.path())?).await?;
    let url = service.nats_url.clone();
    let (code, said) = service.last_words().await?;
    assert_eq!(code, 0);
    let faults: Vec<_> = said.iter().filter(|line| line.contains("\"WARN\"") || line.contains("\"ERROR\"")).collect();
    assert!(faults.is_empty(), "{faults:?}");
    gone(&url).await
}

#[tokio::test]
async fn a_signal_before_it_is_ready_leaves_no_server_behind() -> Result<()> {
    for role in ["execute", "up"] {
        let state = tempfile::tempdir()?;
        let mut command = Command::new(binary()?);
        command.arg(role).arg("--config").arg(config(state.path())?);
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn()?;
        // It stands there as soon as the server listens, before any model is loaded.
        let recorded = async {
            loop {
                match std::fs::read_to_string(state.path().join("nats/url")) {
                    Ok(url) if !url.is_empty() => return url,
                    _ => tokio::task::yield_now().await,
                }
            }
        };
        let url = timeout(PATIENCE, recorded).await.context("no server came")?;
        kill(Pid::from_raw(i32::try_from(child.id().context("it ended")?)?), Signal::SIGTERM)?;
        let status = timeout(PATIENCE, child.wait()).await.context("it did not end")??;
        assert_eq!(status.code(), Some(0), "{role}");
        gone(&url).await?;
    }
    Ok(())
}
