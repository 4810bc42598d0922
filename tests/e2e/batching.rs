//! Many jobs at once over a real NATS server: a high priority starts within two steps, and the service's own metrics agree
//! with what a client measures in the same run. How much batching gains is a bench: `tests/bench/batching.py`.

#![allow(clippy::disallowed_methods)] // A client measures with its own clock.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use millrace_protocol::{Chunk, JobId, JobRequest, Sampling, Status};
use millrace_tests::cluster::{Cluster, JOB_PATIENCE};
use millrace_tests::service::Service;
use tokio::time::timeout;

fn job(tokens: u32, priority: u8) -> JobRequest {
    JobRequest {
        prompt: Some("a".into()),
        max_tokens: Some(tokens),
        ignore_eos: true,
        priority: Some(priority),
        sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
        ..JobRequest::default()
    }
}

/// What a client sees of one job.
struct Seen {
    /// From publishing to the first token.
    first: Duration,
    /// From the first to the last token.
    rest: Duration,
    tokens: usize,
    /// (sequence in the output stream, tokens shown so far) of the claim and of each delta.
    marks: Vec<(u64, usize)>,
}

async fn watch(cluster: &Cluster, id: String, request: JobRequest) -> Result<Seen> {
    let mut follow = cluster.bus.follow(&JobId::new(&id)?, 0).await?;
    let published = Instant::now();
    cluster.publish(&id, &request).await?;
    let mut seen = Seen { first: Duration::ZERO, rest: Duration::ZERO, tokens: 0, marks: vec![] };
    let read = async {
        while let Some(next) = follow.next().await {
            let (sequence, chunk) = next?;
            match chunk.chunk {
                Chunk::Claim { .. } => {}
                Chunk::Delta { token_ids, .. } => {
                    if seen.tokens == 0 {
                        seen.first = published.elapsed();
                    }
                    seen.rest = published.elapsed() - seen.first;
                    seen.tokens += token_ids.len();
                }
                Chunk::Final(last) => ensure!(last.status == Status::Done, "{id}: {:?}", last.error),
            }
            seen.marks.push((sequence, seen.tokens));
        }
        anyhow::Ok(())
    };
    timeout(JOB_PATIENCE, read).await.context("no end")??;
    Ok(seen)
}

/// Mean of what a histogram of the service has observed, and how often.
async fn mean(service: &Service, family: &str) -> Result<(f64, f64)> {
    let of = |part: &str| format!("millrace_scheduler_{family}_{part}");
    let (sum, count) = (service.metric(&of("sum"), "demo").await?, service.metric(&of("count"), "demo").await?);
    ensure!(count > 0.0, "{family} was never observed");
    Ok((sum / count, count))
}

#[tokio::test]
async fn a_high_priority_starts_within_two_steps_of_sixty_four_others() -> Result<()> {
    let cluster = Cluster::start().await?;
    let config = cluster.config("up", "[scheduler]\nmax_sequences = 16\nwaiting = 64\n")?;
    let service = Service::start(&["up"], &config).await?;
    // The first is older than all others of its priority, so it is never the one that makes room.
    let oldest = watch(&cluster, "oldest".into(), job(600, 5));
    let others = async {
        let mut follow = cluster.bus.follow(&JobId::new("oldest")?, 0).await?;
        for _ in 0..3 {
            follow.next().await.context("the oldest ended")??;
        }
        let crowd = try_join_all((0..63).map(|index| watch(&cluster, format!("crowd-{index}"), job(60, 5))));
        let urgent = async {
            // In the middle: every slot is taken and others wait.
            let full = async {
                while service.metric("millrace_scheduler_waiting_jobs", "demo").await? < 8.0 {
                    tokio::task::yield_now().await;
                }
                anyhow::Ok(())
            };
            timeout(JOB_PATIENCE, full).await.context("the slots were never full")??;
            watch(&cluster, "urgent".into(), job(4, 9)).await
        };
        let (crowd, urgent) = tokio::try_join!(crowd, urgent)?;
        anyhow::Ok((crowd, urgent))
    };
    let (oldest, (crowd, urgent)) = tokio::try_join!(oldest, others)?;
    assert!(crowd.iter().all(|seen| seen.tokens == 60));
    let claimed = urgent.marks.first().context("no claim")?.0;
    let started = urgent.marks.iter().find(|(_, tokens)| *tokens > 0).context("no token")?.0;
    // The oldest job draws one token in each step: its tokens count the steps between two places of the output stream.
    let steps_by = |sequence: u64| {
        let shown = oldest.marks.iter().take_while(|(at, _)| *at < sequence).last();
        shown.map_or(0, |(_, tokens)| *tokens)
    };
    ensure!(
        oldest.marks.last().is_some_and(|(at, _)| *at > started),
        "the oldest job ended before the urgent one began"
    );
    let steps = steps_by(started) - steps_by(claimed);
    // Two steps are out when it comes, the next one is its own; one more for the order in which the jobs' writers store.
    assert!(steps <= 4, "{steps} steps from the claim to the first token");
    assert!(service.metric("millrace_scheduler_preemptions_total", "demo").await? >= 1.0, "nobody made room");
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}

#[tokio::test]
async fn metrics_agree_with_what_the_client_measures() -> Result<()> {
    let cluster = Cluster::start().await?;
    // Few slots, so that most of the wait is for a slot: in the scheduler, in preprocessing and in the queue.
    let config = cluster.config("up", "[scheduler]\nmax_sequences = 4\nwaiting = 4\n")?;
    let service = Service::start(&["up"], &config).await?;
    let seen = try_join_all((0..64).map(|index| watch(&cluster, format!("job-{index}"), job(80, 5)))).await?;
    let count = seen.len() as f64;
    let ttft = seen.iter().map(|seen| seen.first.as_secs_f64()).sum::<f64>() / count;
    let gaps = seen.iter().map(|seen| seen.tokens - 1).sum::<usize>() as f64;
    let itl = seen.iter().map(|seen| seen.rest.as_secs_f64()).sum::<f64>() / gaps;
    let near = |name: &str, client: f64, (service, observed): (f64, f64), expected: f64| {
        assert_eq!(observed, expected, "{name}");
        assert!((service / client - 1.0).abs() <= 0.1, "{name}: the service says {service} s, the client {client} s");
    };
    near("time to first token", ttft, mean(&service, "time_to_first_token_seconds").await?, count);
    near("inter-token time", itl, mean(&service, "inter_token_seconds").await?, gaps);
    // A prompt of one token takes one step: the rest of the time to the first token is the queue.
    near("queue", ttft - itl, mean(&service, "queue_seconds").await?, count);
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}
