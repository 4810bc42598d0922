//! Faults: processes are killed (SIGKILL) while jobs run; every job still ends exactly once with the text of an
//! uninterrupted run, and what was shown before the fault stays.

mod pairs;

use anyhow::{Context, Result};
use millrace_protocol::{Chunk, JobId, JobRequest, OutputChunk, Sampling, Status};
use millrace_tests::cluster::Cluster;
use millrace_tests::samples::committed;

/// Draws 400 tokens at temperature 1: any disturbance of the random counter changes the text.
fn long_job(seed: u64) -> JobRequest {
    JobRequest {
        prompt: Some("a large red circle".into()),
        max_tokens: Some(400),
        ignore_eos: true,
        sampling: Sampling { temperature: Some(1.0), seed: Some(seed), ..Sampling::default() },
        ..JobRequest::default()
    }
}

/// Waits until `id` has shown something.
async fn shown(cluster: &Cluster, id: &str) -> Result<()> {
    let mut follow = cluster.bus.follow(&JobId::new(id)?, 0).await?;
    loop {
        let (_, chunk) = follow.next().await.context("the output ended")??;
        if matches!(chunk.chunk, Chunk::Delta { .. }) {
            return Ok(());
        }
    }
}

fn attempts(chunks: &[OutputChunk]) -> usize {
    chunks.iter().filter(|chunk| matches!(chunk.chunk, Chunk::Claim { .. })).count()
}

/// The text of the job without any fault.
async fn undisturbed(cluster: &Cluster, seed: u64) -> Result<String> {
    let id = format!("calm-{seed}");
    cluster.publish(&id, &long_job(seed)).await?;
    let (last, chunks) = cluster.finished(&id).await?;
    assert_eq!((last.status, attempts(&chunks)), (Status::Done, 1));
    Ok(last.text)
}

#[tokio::test]
async fn a_killed_executor_is_replaced_and_the_answer_goes_on() -> Result<()> {
    let cluster = Cluster::start().await?;
    let preprocess = cluster.run("preprocess").await?;
    let schedule = cluster.run("schedule").await?;
    let first = cluster.run("execute").await?;
    let calm = undisturbed(&cluster, 7).await?;
    cluster.publish("disturbed", &long_job(7)).await?;
    shown(&cluster, "disturbed").await?;
    first.kill().await?;
    let second = cluster.run("execute").await?;
    let (last, _) = cluster.finished("disturbed").await?;
    assert_eq!((last.status, last.text), (Status::Done, calm));
    for service in [preprocess, schedule, second] {
        assert_eq!(service.terminate().await?, 0);
    }
    assert_eq!(cluster.queued().await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_killed_scheduler_hands_over_through_the_queue_and_the_answer_goes_on() -> Result<()> {
    let cluster = Cluster::start().await?;
    let execute = cluster.run("execute").await?;
    let preprocess = cluster.run("preprocess").await?;
    let first = cluster.run("schedule").await?;
    let calm = undisturbed(&cluster, 8).await?;
    cluster.publish("disturbed", &long_job(8)).await?;
    shown(&cluster, "disturbed").await?;
    first.kill().await?;
    let second = cluster.run("schedule").await?;
    let (last, chunks) = cluster.finished("disturbed").await?;
    assert_eq!((last.status, last.text), (Status::Done, calm));
    assert_eq!(attempts(&chunks), 2, "one claim by each owner");
    for service in [preprocess, second, execute] {
        assert_eq!(service.terminate().await?, 0);
    }
    assert_eq!(cluster.queued().await?, 0);
    Ok(())
}

#[tokio::test]
async fn everything_killed_at_once_is_taken_up_by_a_fresh_process() -> Result<()> {
    let cluster = Cluster::start().await?;
    let first = cluster.run("up").await?;
    let calm = undisturbed(&cluster, 9).await?;
    cluster.publish("disturbed", &long_job(9)).await?;
    let samples = committed()?;
    for sample in &samples {
        cluster.publish(&sample.id, &sample.job()?).await?;
    }
    shown(&cluster, "disturbed").await?;
    first.kill().await?;
    let second = cluster.run("up").await?;
    assert_eq!(cluster.finished("disturbed").await?.0.text, calm);
    for sample in &samples {
        let (last, _) = cluster.finished(&sample.id).await?;
        assert_eq!((last.status, &last.text), (Status::Done, &sample.text_f32), "{}", sample.id);
    }
    assert_eq!(second.terminate().await?, 0);
    assert_eq!(cluster.queued().await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_killed_preprocess_loses_no_job() -> Result<()> {
    let cluster = Cluster::start().await?;
    let execute = cluster.run("execute").await?;
    let first = cluster.run("preprocess").await?;
    let samples = committed()?;
    for sample in &samples {
        cluster.publish(&sample.id, &sample.job()?).await?;
    }
    // No scheduler yet: jobs are prepared and held, pages and all, when their holder dies.
    first.kill().await?;
    let schedule = cluster.run("schedule").await?;
    let second = cluster.run("preprocess").await?;
    for sample in &samples {
        let (last, _) = cluster.finished(&sample.id).await?;
        assert_eq!((last.status, &last.text), (Status::Done, &sample.text_f32), "{}", sample.id);
    }
    for service in [second, schedule, execute] {
        assert_eq!(service.terminate().await?, 0);
    }
    assert_eq!(cluster.queued().await?, 0);
    Ok(())
}
