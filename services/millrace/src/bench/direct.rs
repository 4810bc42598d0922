//! One case in this process without NATS, pager or scheduler: the engine alone. The difference to the same case through
//! NATS is what the queue costs.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use millrace_executor::generate::{GenerateOptions, Request, generate};
use millrace_executor::{ExecutorMetrics, LoadOptions, StepEngine, load};
use millrace_preprocess::{PrepareLimits, Preparer};
use millrace_protocol::{JobId, JobRequest};
use millrace_runtime::Clock;
use millrace_telemetry::Registry;

use super::measure::{Measured, RequestTimes};
use crate::exit::usage;
use crate::generate::media::{Files, Patches};

/// A loaded model.
pub struct Direct {
    preparer: Preparer,
    engine: Box<dyn StepEngine>,
    /// Metrics of the device's memory.
    pub registry: Registry,
    options: LoadOptions,
}

impl Direct {
    /// Loads the model of `folder`.
    ///
    /// # Errors
    /// A folder that is no supported checkpoint.
    pub fn load(folder: &Path, limits: PrepareLimits, options: LoadOptions) -> anyhow::Result<Self> {
        let preparer = Preparer::load(folder, limits).map_err(|error| usage(error.to_string()))?;
        let engine = load(folder, &options).map_err(|error| usage(format!("{}: {error}", folder.display())))?;
        let registry = Registry::new();
        if let Some(reader) = engine.memory_reader() {
            ExecutorMetrics::register(&registry)?.show_memory(options.model.as_str(), reader);
        }
        Ok(Self { preparer, engine, registry, options })
    }

    /// Prepares the requests one after another, then runs all of them side by side; preparing counts.
    ///
    /// # Errors
    /// Requests that do not fit into the engine together, or one that fails.
    pub async fn run(&mut self, jobs: &[JobRequest], clock: &Clock) -> anyhow::Result<Measured> {
        let started = clock.now();
        let (mut requests, mut media, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        for (number, job) in jobs.iter().enumerate() {
            let gathered = self.preparer.gather(job, &Files).await?;
            let id = JobId::new(format!("bench-{number}"))?;
            let prepared = self.preparer.build(job, &id, gathered, clock.unix_ms())?;
            counts.push(prepared.media.len());
            media.extend(prepared.media);
            requests.push(Request {
                prompt: prepared.prompt,
                answer: Vec::new(),
                media: Vec::new(),
                sampling: prepared.sampling,
                max_tokens: usize::try_from(prepared.max_tokens)?,
                stop_token_ids: prepared.stop_token_ids,
            });
        }
        let (items, mut patches) = Patches::of(media, &self.options.executor);
        let mut items = items.into_iter();
        for (request, count) in requests.iter_mut().zip(counts) {
            request.media = items.by_ref().take(count).collect();
        }
        let mut times: Vec<RequestTimes> = vec![RequestTimes::default(); requests.len()];
        let mut newest: Vec<Option<Instant>> = vec![None; requests.len()];
        let mut on_token = |number: usize, _: u32| {
            let now = clock.now();
            let (Some(request), Some(newest)) = (times.get_mut(number), newest.get_mut(number)) else { return };
            request.last = now.saturating_duration_since(started).as_secs_f64();
            request.tokens += 1;
            match newest.replace(now) {
                None => request.first = Some(request.last),
                Some(before) => request.gaps.push(now.saturating_duration_since(before).as_secs_f64()),
            }
        };
        let engine = self.engine.as_mut();
        let options = GenerateOptions::default();
        let made = tokio::task::block_in_place(|| generate(engine, &requests, &options, &mut patches, &mut on_token));
        let made =
            made.context("--no-nats runs every request of a case side by side: raise [executor] kv_bytes and slots")?;
        if let Some(error) = made.into_iter().find_map(|one| one.error) {
            bail!("a request failed: {error}");
        }
        for (times, request) in times.iter_mut().zip(&requests) {
            times.prompt_tokens = u64::try_from(request.prompt.len())?;
        }
        let seconds = clock.now().saturating_duration_since(started).as_secs_f64();
        Ok(Measured { seconds, requests: times })
    }
}
