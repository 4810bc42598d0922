//! One case through NATS: publishes every job at once, reads every chunk as it is stored, keeps the times.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::StreamExt;
use futures::stream;
use millrace_protocol::output::Status;
use millrace_protocol::{Chunk, Class, JobId, ModelName};
use millrace_runtime::Clock;

use crate::service::Service;

/// Publishes that wait for their acknowledgement side by side.
const PUBLISHING: usize = 64;
/// Silence after which a case is given up.
const SILENCE: Duration = Duration::from_secs(300);

/// Times of one request, in seconds since it was submitted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RequestTimes {
    /// First token.
    pub first: Option<f64>,
    /// End.
    pub last: f64,
    /// Between one delivery of tokens and the next.
    pub gaps: Vec<f64>,
    /// Tokens generated.
    pub tokens: u64,
    /// Prompt tokens, placeholders included.
    pub prompt_tokens: u64,
}

/// What a case took.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// From the first submission to the last result.
    pub seconds: f64,
    /// Each request.
    pub requests: Vec<RequestTimes>,
}

/// A job ready to be published.
#[derive(Debug, Clone)]
pub struct Ready {
    /// Its id.
    pub job: JobId,
    /// The JSON document.
    pub document: Vec<u8>,
}

struct Running {
    sent: Instant,
    newest: Option<Instant>,
    times: RequestTimes,
    ended: bool,
}

/// Publishes `jobs` and reads all their results.
///
/// # Errors
/// A job that did not end well, with its reason; five minutes of silence; the bus's.
pub async fn through_nats(
    service: &Service,
    class: Class,
    model: &ModelName,
    jobs: Vec<Ready>,
    clock: &Clock,
    done: &mut dyn FnMut(usize),
) -> anyhow::Result<Measured> {
    let mut outputs = service.bus().watch_outputs().await?;
    let started = clock.now();
    let mut running = HashMap::with_capacity(jobs.len());
    for job in &jobs {
        let fresh = Running { sent: started, newest: None, times: RequestTimes::default(), ended: false };
        running.insert(job.job.clone(), fresh);
    }
    let order: Vec<JobId> = jobs.iter().map(|job| job.job.clone()).collect();
    let mut publishing = stream::iter(jobs)
        .map(|Ready { job, document }| async move {
            let sent = clock.now();
            let published = service.publish_document(class, model, &job, document).await;
            published.map(|()| (job, sent))
        })
        .buffer_unordered(PUBLISHING)
        .fuse();
    let mut open = order.len();
    while open > 0 {
        tokio::select! {
            Some(published) = publishing.next() => {
                let (job, sent) = published?;
                if let Some(request) = running.get_mut(&job) {
                    request.sent = sent;
                }
            }
            output = tokio::time::timeout(SILENCE, outputs.next()) => {
                let chunk = output.context("no result for five minutes; `millrace status` shows who is there")??;
                let Some(request) = running.get_mut(&chunk.job) else { continue };
                if take(request, chunk.chunk, clock.now()).with_context(|| format!("job {}", chunk.job))? {
                    open -= 1;
                    done(order.len() - open);
                }
            }
        }
    }
    let seconds = clock.now().saturating_duration_since(started).as_secs_f64();
    let requests = order.iter().filter_map(|job| running.remove(job)).map(|request| request.times).collect();
    Ok(Measured { seconds, requests })
}

/// Takes a chunk into account; whether the request ended with it.
fn take(request: &mut Running, chunk: Chunk, now: Instant) -> anyhow::Result<bool> {
    let since = |from: Instant| now.saturating_duration_since(from).as_secs_f64();
    match chunk {
        Chunk::Claim { .. } => Ok(false),
        Chunk::Delta { token_ids, .. } if token_ids.is_empty() => Ok(false),
        Chunk::Delta { .. } => {
            match request.newest.replace(now) {
                None => request.times.first = Some(since(request.sent)),
                Some(before) => request.times.gaps.push(since(before)),
            }
            Ok(false)
        }
        Chunk::Final(last) => {
            if last.status != Status::Done {
                let why = last.error.map_or_else(String::new, |error| error.to_string());
                bail!("ended as {}: {why}", last.status.as_str());
            }
            let fresh = !std::mem::replace(&mut request.ended, true);
            request.times.last = since(request.sent);
            request.times.first.get_or_insert(request.times.last);
            request.times.tokens = last.usage.completion_tokens;
            request.times.prompt_tokens = last.usage.prompt_tokens;
            Ok(fresh)
        }
    }
}
