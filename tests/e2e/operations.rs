//! What operators rely on: metrics, health, drain, cancellation.

use anyhow::{Context, Result, ensure};
use millrace_protocol::{JobId, JobRequest, Sampling, Status};
use millrace_tests::cluster::Cluster;
use millrace_tests::samples::committed;
use tokio::process::Command;

/// A job that runs until it is stopped: no end-of-text, as many tokens as fit.
fn endless() -> JobRequest {
    JobRequest {
        prompt: Some("a".into()),
        max_tokens: Some(1_500),
        ignore_eos: true,
        sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
        ..JobRequest::default()
    }
}

#[tokio::test]
async fn metrics_count_the_work_and_pass_prometheus_own_lint() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let samples = committed()?;
    for sample in samples.iter().take(3) {
        cluster.publish(&sample.id, &sample.job()?).await?;
    }
    for sample in samples.iter().take(3) {
        cluster.finished(&sample.id).await?;
    }
    assert_eq!(service.get("/healthz").await?.0, 200);
    assert_eq!(service.get("/readyz").await?.0, 200);
    assert_eq!(service.metric("millrace_preprocess_jobs_pulled_total", "interactive").await?, 3.0);
    assert!(service.metric("millrace_executor_steps_total", "").await? >= 3.0);
    assert!(service.metric("millrace_executor_drawn_tokens_total", "").await? >= 3.0);
    assert!(service.metric("millrace_executor_page_bytes_total", "local").await? > 0.0);

    let (_, text) = service.get("/metrics").await?;
    let mut lint = Command::new("promtool");
    lint.args(["check", "metrics"]).stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    lint.stdout(std::process::Stdio::piped());
    let mut child = lint.spawn().context("promtool is missing: ./tests/run.sh installs it")?;
    let mut stdin = child.stdin.take().context("stdin")?;
    tokio::io::AsyncWriteExt::write_all(&mut stdin, text.as_bytes()).await?;
    drop(stdin);
    let verdict = child.wait_with_output().await?;
    let said = String::from_utf8_lossy(&verdict.stdout).into_owned() + &String::from_utf8_lossy(&verdict.stderr);
    ensure!(verdict.status.success(), "promtool: {said}");
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_running_job_is_cancelled_and_its_output_ends() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    cluster.publish("endless", &endless()).await?;
    let job = JobId::new("endless")?;
    let mut follow = cluster.bus.follow(&job, 0).await?;
    for _ in 0..4 {
        follow.next().await.context("the output ended")??;
    }
    cluster.bus.cancel(&job).await?;
    let (last, _) = cluster.finished("endless").await?;
    assert_eq!(last.status, Status::Cancelled);
    assert!(!last.token_ids.is_empty());

    cluster.bus.cancel(&JobId::new("never-started")?).await?;
    cluster.publish("never-started", &endless()).await?;
    let (last, _) = cluster.finished("never-started").await?;
    assert_eq!((last.status, last.token_ids.len()), (Status::Cancelled, 0));
    assert_eq!(service.terminate().await?, 0);
    assert_eq!(cluster.queued().await?, 0);
    Ok(())
}

#[tokio::test]
async fn sigterm_lets_running_jobs_end_and_takes_no_new_ones() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let request = JobRequest { max_tokens: Some(64), ..endless() };
    cluster.publish("running", &request).await?;
    let mut follow = cluster.bus.follow(&JobId::new("running")?, 0).await?;
    follow.next().await.context("the output ended")??;
    follow.next().await.context("the output ended")??;
    assert_eq!(service.terminate().await?, 0);
    let (last, _) = cluster.finished("running").await?;
    assert_eq!((last.status, last.token_ids.len()), (Status::Done, 64));
    assert_eq!(cluster.queued().await?, 0);
    Ok(())
}
