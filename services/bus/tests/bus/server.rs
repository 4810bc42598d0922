//! The managed server's life: found or explained, one per folder, gone with its owner.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use millrace_bus::{Bus, BusError, ManagedServer};
use millrace_config::{Config, Environment, Nats, NatsUrl};
use millrace_runtime::Clock;

use crate::support::{options, server, soon, streams};

fn runs(pid: u32) -> bool {
    // A child that was killed and not yet waited for counts as gone.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

async fn gone(pid: u32) {
    soon(async {
        while runs(pid) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_stopped_server_is_gone_and_frees_its_folder() {
    let server = server().await;
    let pid = server.managed.pid().unwrap();
    assert!(runs(pid));
    soon(server.managed.stop()).await;
    assert!(!runs(pid));
    assert_eq!((server.managed.pid(), server.managed.restarts()), (None, 0));
}

#[tokio::test]
async fn a_dropped_server_is_killed_and_its_folder_can_be_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let first = ManagedServer::start(&options(dir.path())).await.unwrap();
    let pid = first.pid().unwrap();
    let busy = ManagedServer::start(&options(dir.path())).await.unwrap_err();
    assert!(busy.to_string().contains("in use by another process"), "{busy}");
    drop(first);
    gone(pid).await;
    ManagedServer::start(&options(dir.path())).await.unwrap();
}

#[tokio::test]
async fn the_folder_stays_locked_as_long_as_the_server_itself_lives() {
    let dir = tempfile::tempdir().unwrap();
    let managed = ManagedServer::start(&options(dir.path())).await.unwrap();
    // The child holds the lock too, so that a server whose owner was killed -9 cannot get a rival on its files.
    let inherited = std::fs::read_link(format!("/proc/{}/fd/0", managed.pid().unwrap())).unwrap();
    assert_eq!(inherited, dir.path().join("millrace.lock").canonicalize().unwrap());
}

#[tokio::test]
async fn a_missing_binary_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.binary = Some("/nonexistent/nats-server".into());
    let error = ManagedServer::start(&options).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, BusError::ServerMissing { .. }), "{text}");
    for hint in ["/nonexistent/nats-server", "2.15.1", "MILLRACE_NATS_SERVER", "[nats] server_path", "tests/run.sh"] {
        assert!(text.contains(hint), "{hint} is not in: {text}");
    }
}

fn script(dir: &Path, text: &str) -> std::path::PathBuf {
    let path = dir.join("fake-server");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn an_old_binary_is_refused_with_its_version() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.binary = Some(script(dir.path(), "echo 'nats-server: v2.9.10'"));
    let error = ManagedServer::start(&options).await.unwrap_err();
    assert!(error.to_string().contains("v2.9.10"), "{error}");
}

#[tokio::test]
async fn a_server_that_does_not_start_is_quoted() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    let fake = "case $1 in -v) echo 'nats-server: v2.15.1';; *) echo 'no space left' >&2; exit 3;; esac";
    options.binary = Some(script(dir.path(), fake));
    let error = ManagedServer::start(&options).await.unwrap_err();
    assert!(error.to_string().contains("no space left") && error.to_string().contains('3'), "{error}");
}

#[tokio::test]
async fn auto_starts_a_server_that_a_second_process_finds() {
    let dir = tempfile::tempdir().unwrap();
    let nats = Nats {
        url: NatsUrl::Managed,
        server_path: Environment::read().nats_server,
        store_dir: dir.path().to_path_buf(),
        ..Config::default().nats
    };
    let owner = Bus::connect(&nats, &streams(), "owner", Clock::system()).await.unwrap();
    owner.ensure_streams().await.unwrap();
    let pid = owner.managed_server().unwrap().pid().unwrap();
    let auto = Nats { url: NatsUrl::Auto, ..nats };
    let guest = Bus::connect(&auto, &streams(), "guest", Clock::system()).await.unwrap();
    assert_eq!((guest.url(), guest.managed_server().is_some()), (owner.url(), false));
    guest.shutdown().await;
    assert!(runs(pid));
    soon(owner.shutdown()).await;
    assert!(!runs(pid));
}

#[tokio::test]
async fn an_unreachable_server_is_named() {
    let nats = Nats { url: NatsUrl::Url("nats://127.0.0.1:1".into()), ..Config::default().nats };
    let error = match Bus::connect(&nats, &streams(), "test", Clock::system()).await {
        Ok(_) => panic!("connected to nothing"),
        Err(error) => error,
    };
    assert!(error.to_string().contains("nats://127.0.0.1:1"), "{error}");
}
