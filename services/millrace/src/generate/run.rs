//! One generation in this process: prepare, load, step to the end, and text as it grows.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use millrace_executor::generate::{GenerateOptions, Generated, Request, generate};
use millrace_executor::{LoadOptions, RowLogits, load};
use millrace_preprocess::{PrepareLimits, Prepared, Preparer};
use millrace_protocol::output::{FinishReason, Usage};
use millrace_protocol::ready::Shown;
use millrace_protocol::{JobId, JobRequest};
use millrace_runtime::Clock;
use millrace_scheduler::emit::{Emitter, Vocabulary};

use super::media::{Files, Patches};
use super::output::{Answer, Timings};
use super::place::place;
use crate::exit::usage;

/// A prepared generation.
pub struct Plan {
    prepared: Prepared,
    preprocess_ms: f64,
}

/// Prepares the job; with `ids`, those are the prompt and the job only carries media.
///
/// # Errors
/// The job's fault as a usage fault: it names what to change.
pub async fn prepare(
    folder: &Path,
    limits: PrepareLimits,
    request: &JobRequest,
    ids: Option<&[u32]>,
    clock: &Clock,
) -> anyhow::Result<Plan> {
    let preparer = Preparer::load(folder, limits).map_err(|error| usage(error.to_string()))?;
    let started = clock.now();
    let fault = |error: millrace_protocol::JobError| usage(error.to_string());
    let gathered = preparer.gather(request, &Files).await.map_err(fault)?;
    let job = JobId::new("generate")?;
    let mut prepared = preparer.build(request, &job, gathered, clock.unix_ms()).map_err(fault)?;
    if let (Some(ids), Some(tokens)) = (ids, preparer.facts().vision) {
        prepared.media = place(ids, prepared.media, tokens)?;
        prepared.prompt = ids.to_vec();
    }
    Ok(Plan { prepared, preprocess_ms: millis(started, clock) })
}

/// Runs the plan on the model of `folder`; `show` sees text as it becomes certain.
///
/// # Errors
/// A model that does not load, a sequence that fails.
pub fn run(
    folder: &Path,
    options: &LoadOptions,
    plan: Plan,
    clock: &Clock,
    show: &mut dyn FnMut(&str),
) -> anyhow::Result<(Answer, Vec<RowLogits>)> {
    let loading = clock.now();
    let mut engine = load(folder, options).map_err(|error| usage(format!("{}: {error}", folder.display())))?;
    let load_ms = millis(loading, clock);
    let vocabulary = Arc::new(Vocabulary::load(folder)?);
    let (mut emitter, _) = Emitter::resume(vocabulary, plan.prepared.stop.clone(), &Shown::default())?;
    let prompt_tokens = plan.prepared.prompt.len();
    let stop_token_ids = plan.prepared.stop_token_ids.clone();
    let (items, mut patches) = Patches::of(plan.prepared.media, &options.executor);
    let request = Request {
        prompt: plan.prepared.prompt,
        answer: Vec::new(),
        media: items,
        sampling: plan.prepared.sampling,
        max_tokens: usize::try_from(plan.prepared.max_tokens)?,
        stop_token_ids: stop_token_ids.clone(),
    };
    let started = clock.now();
    let mut first_token_ms = None;
    let mut decoding = Ok(());
    let mut on_token = |_: usize, token: u32| {
        first_token_ms.get_or_insert_with(|| millis(started, clock));
        if decoding.is_err() || stop_token_ids.contains(&token) {
            return;
        }
        decoding = emitter.push(token, None).map(drop);
        if let Some(delta) = emitter.take() {
            show(&delta.text);
        }
    };
    let generated = generate(engine.as_mut(), &[request], &GenerateOptions::default(), &mut patches, &mut on_token)?;
    let total_ms = millis(started, clock);
    decoding?;
    emitter.finish()?;
    if let Some(delta) = emitter.take() {
        show(&delta.text);
    }
    let Generated { mut tokens, logprobs, finish, error, logits } =
        generated.into_iter().next().context("the engine gave no answer")?;
    if let Some(error) = error {
        return Err(error.into());
    }
    let completion_tokens = tokens.len();
    if finish == Some(FinishReason::Stop) {
        tokens.pop();
    }
    let answer = Answer {
        token_ids: tokens,
        text: emitter.text().to_string(),
        finish_reason: finish,
        logprobs,
        usage: Usage {
            prompt_tokens: u64::try_from(prompt_tokens)?,
            cached_tokens: 0,
            completion_tokens: u64::try_from(completion_tokens)?,
        },
        timings: Timings {
            load_ms,
            preprocess_ms: plan.preprocess_ms,
            first_token_ms: first_token_ms.unwrap_or(total_ms),
            total_ms,
        },
    };
    Ok((answer, logits))
}

fn millis(since: Instant, clock: &Clock) -> f64 {
    clock.now().saturating_duration_since(since).as_secs_f64() * 1000.0
}
