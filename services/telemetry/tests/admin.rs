//! The admin endpoint over real sockets, and its exposition text against Prometheus' own checker.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.

use std::io::Write as _;
use std::process::{Command, Stdio};

use millrace_telemetry::{AdminServer, Health, LogForm, Registry, TelemetryError, buckets, init_logs};
use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Status and body of a GET, by hand: no client library stands between the test and the wire.
async fn get(server: &AdminServer, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_string())
}

fn registry() -> Registry {
    let registry = Registry::new();
    let jobs = IntCounterVec::new(Opts::new("millrace_jobs_total", "Jobs that ended."), &["status"]).unwrap();
    let options = HistogramOpts::new("millrace_first_token_seconds", "Acceptance to first token.");
    let first_token = Histogram::with_opts(options.buckets(buckets::TTFT_SECS.to_vec())).unwrap();
    registry.register(Box::new(jobs.clone())).unwrap();
    registry.register(Box::new(first_token.clone())).unwrap();
    jobs.with_label_values(&["done"]).inc_by(3);
    first_token.observe(0.03);
    registry
}

#[tokio::test]
async fn metrics_are_exposed_in_the_text_format() {
    let server = AdminServer::start("127.0.0.1:0".parse().unwrap(), registry(), Health::new()).await.unwrap();
    assert_ne!(server.address().port(), 0);
    let (status, body) = get(&server, "/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "# HELP millrace_jobs_total Jobs that ended.",
        "# TYPE millrace_jobs_total counter",
        "millrace_jobs_total{status=\"done\"} 3",
        "millrace_first_token_seconds_bucket{le=\"0.02\"} 0",
        "millrace_first_token_seconds_bucket{le=\"0.04\"} 1",
        "millrace_first_token_seconds_bucket{le=\"2560\"} 1",
        "millrace_first_token_seconds_count 1",
    ] {
        assert!(body.lines().any(|found| found == line), "{line} is not in\n{body}");
    }
    server.shutdown().await;
}

#[tokio::test]
async fn readiness_names_every_failed_condition() {
    let health = Health::new();
    let server = AdminServer::start("127.0.0.1:0".parse().unwrap(), Registry::new(), health.clone()).await.unwrap();
    assert_eq!(get(&server, "/readyz").await.0, 200);
    health.set_ready("nats");
    health.set_not_ready("model", "still loading \"demo\"");
    assert!(!health.is_ready());
    let (status, body) = get(&server, "/readyz").await;
    let answer: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 503);
    let conditions = serde_json::json!({ "model": "still loading \"demo\"", "nats": null });
    assert_eq!(answer, serde_json::json!({ "ready": false, "conditions": conditions }));
    health.set_ready("model");
    assert_eq!(get(&server, "/readyz").await.0, 200);
    health.set_not_ready("nats", "lost");
    health.remove("nats");
    assert_eq!(get(&server, "/readyz").await.0, 200);
}

#[tokio::test]
async fn liveness_does_not_depend_on_readiness() {
    let health = Health::new();
    health.set_not_ready("model", "loading");
    let server = AdminServer::start("127.0.0.1:0".parse().unwrap(), Registry::new(), health).await.unwrap();
    for path in ["/livez", "/healthz"] {
        assert_eq!(get(&server, path).await, (200, "ok\n".to_string()));
    }
    assert_eq!(get(&server, "/nothing").await.0, 404);
}

#[tokio::test]
async fn a_taken_address_is_named_and_a_closed_one_is_free() {
    let first = AdminServer::start("127.0.0.1:0".parse().unwrap(), Registry::new(), Health::new()).await.unwrap();
    let address = first.address();
    let error = AdminServer::start(address, Registry::new(), Health::new()).await.unwrap_err();
    assert!(matches!(error, TelemetryError::Listen { .. }) && error.to_string().contains(&address.to_string()));
    first.shutdown().await;
    AdminServer::start(address, Registry::new(), Health::new()).await.unwrap();
}

#[tokio::test]
async fn promtool_accepts_the_exposition() {
    let Ok(mut promtool) = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    else {
        panic!("promtool is not in PATH: install the Debian package `prometheus` (./tests/run.sh does)");
    };
    let server = AdminServer::start("127.0.0.1:0".parse().unwrap(), registry(), Health::new()).await.unwrap();
    let (_, body) = get(&server, "/metrics").await;
    promtool.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn logs_start_once_and_refuse_a_bad_filter() {
    let error = init_logs(LogForm::Text, "millrace=loudest").unwrap_err();
    assert!(error.to_string().contains("millrace=loudest"), "{error}");
    init_logs(LogForm::Json, "warn,millrace_bus=debug").unwrap();
    assert!(matches!(init_logs(LogForm::Text, "info"), Err(TelemetryError::LogsTwice)));
}
