//! `millrace bench` reports what it measured under the keys of the baselines, through NATS and without.

use anyhow::{Context, Result, ensure};
use millrace_tests::cluster::{Cluster, MODEL};
use millrace_tests::service::binary;
use millrace_tests::workspace::root;
use serde_json::Value;
use tokio::process::Command;

async fn report(arguments: &[&str]) -> Result<Value> {
    let output = Command::new(binary()?).arg("bench").args(arguments).arg("--json").output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("the report is not JSON")
}

/// Tokens generated, as the rate and the time of a row give them.
fn tokens(row: &Value) -> Option<f64> {
    Some((row["out_tok_s"].as_f64()? * row["s"].as_f64()?).round())
}

#[tokio::test]
async fn a_running_service_is_measured_from_outside() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let url = cluster.bus.url();
    let text =
        ["--nats", url, "--model", MODEL, "--vocabulary", "1000", "--requests", "5", "--input", "33", "--output", "64"];
    let found = report(&text).await?;
    let row = &found["n5_in33_out64"];
    let drawn = tokens(row).with_context(|| found.to_string())?;
    ensure!((drawn - 320.0).abs() <= 16.0, "the rate times the (rounded) time is not 320 tokens: {row}");
    for key in ["ttft_ms", "itl_ms", "e2e_ms"] {
        ensure!(row[key]["p50"].as_f64().is_some_and(|ms| ms > 0.0), "{key}: {row}");
    }
    ensure!(row["ttft_ms"]["p99"].as_f64() < row["e2e_ms"]["p50"].as_f64(), "a first token after the end: {row}");
    ensure!(row.get("steps").is_none(), "another process's steps cannot be seen: {row}");

    let clips = ["--nats", url, "--model", MODEL, "--requests", "2", "--clip", "4x96x64", "--output", "3"];
    let jpeg = report(&clips).await?;
    let raw = report(&[&clips[..], &["--raw"]].concat()).await?;
    let prompt = |report: &Value| report["video_4f_96x64_n2_out3"]["prompt_tok"].as_u64();
    ensure!(prompt(&jpeg).is_some_and(|count| count > 2 * 6), "{jpeg}");
    assert_eq!(prompt(&jpeg), prompt(&raw));
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}

#[tokio::test]
async fn the_engine_alone_runs_random_weights_of_any_config() -> Result<()> {
    let config = tempfile::tempdir()?;
    let fixture = root().join("tests/golden/fixtures/qwen3/config.json");
    std::fs::copy(fixture, config.path().join("config.json"))?;
    let folder = config.path().to_str().context("path")?;
    let arguments = format!("--config {folder} --random-weights --no-nats --requests 3 --input 9 --output 1");
    let found = report(&arguments.split(' ').collect::<Vec<_>>()).await?;
    ensure!(found["prefill_3x9"]["tok_s"].as_f64().is_some_and(|rate| rate > 0.0), "{found}");
    assert_eq!(found["path"], "in-process");
    Ok(())
}
