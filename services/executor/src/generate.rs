//! Generation in one process, without a scheduler: plans steps for a handful of sequences until they end. For tests and
//! the command line; must not preempt, share prefixes or stream over a network.

mod planner;

use millrace_protocol::ready::MediaItem;
use millrace_protocol::sampling::{ResolvedSampling, TokenLogprobs};
use millrace_protocol::{FinishReason, JobError};

use crate::engine::{Collected, MediaSource, RowLogits, STEPS_IN_FLIGHT, StepEngine};
use planner::Planner;

/// One sequence to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Prompt with placeholders expanded.
    pub prompt: Vec<u32>,
    /// Answer tokens that are known already.
    pub answer: Vec<u32>,
    /// Media in prompt order.
    pub media: Vec<MediaItem>,
    /// How tokens are drawn.
    pub sampling: ResolvedSampling,
    /// Most tokens of the answer, known ones included.
    pub max_tokens: usize,
    /// Tokens that end the answer; they stay in it.
    pub stop_token_ids: Vec<u32>,
}

/// How steps are cut.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GenerateOptions {
    /// Most prompt tokens that one sequence computes in a step; `None` is the engine's step budget.
    pub chunk_tokens: Option<u32>,
    /// Order in which blocks of the pool are handed out; `None` is from 0 up.
    pub block_order: Option<Vec<u32>>,
    /// Known answer tokens are computed one by one, as if each had just been drawn: what decode steps compute for a given text.
    pub decode_answers: bool,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Generated {
    /// The answer, known tokens included.
    pub tokens: Vec<u32>,
    /// Of each drawn token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended; `None` if it failed.
    pub finish: Option<FinishReason>,
    /// Why it failed.
    pub error: Option<JobError>,
    /// Logits behind each token in order, if the engine keeps them.
    pub logits: Vec<RowLogits>,
}

/// Why nothing can be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The requests do not fit the engine together.
    #[error("the requests need {needed} {what}, the engine has {available}")]
    DoesNotFit {
        /// Slots, blocks or tokens.
        what: &'static str,
        /// How many.
        needed: u64,
        /// How many there are.
        available: u64,
    },
    /// The engine found the plan contradictory: a bug on one of the two sides.
    #[error("the engine broke off: {0}")]
    Broken(String),
}

/// Runs `requests` side by side to their ends. `on_token(request, token)` sees each token when it is drawn. Slots that the
/// engine held before are forgotten.
///
/// # Errors
/// Requests that do not fit together, or an engine that breaks off. A request that fails alone is in its [`Generated`].
pub fn generate(
    engine: &mut dyn StepEngine,
    requests: &[Request],
    options: &GenerateOptions,
    media: &mut dyn MediaSource,
    on_token: &mut dyn FnMut(usize, u32),
) -> Result<Vec<Generated>, GenerateError> {
    engine.reset();
    let mut planner = Planner::new(&engine.spec(), requests, options)?;
    let start = |request: &Request| Generated { tokens: request.answer.clone(), ..Generated::default() };
    let mut results: Vec<Generated> = requests.iter().map(start).collect();
    let mut under_way = 0;
    loop {
        // The next step goes to the device before the last one has ended, if it is one that computes on its own.
        while under_way < STEPS_IN_FLIGHT && (under_way == 0 || !engine.has_ended()) {
            let Some(plan) = planner.next() else { break };
            engine.launch(&plan, media);
            under_way += 1;
        }
        let Some(Collected { output, .. }) = engine.collect() else { break };
        under_way -= 1;
        if let Some(why) = output.broken {
            return Err(GenerateError::Broken(why));
        }
        for row in engine.take_logits() {
            if let Some(result) = results.get_mut(row.slot as usize) {
                result.logits.push(row);
            }
        }
        for (slot, error) in output.failed {
            planner.end(slot.0);
            if let Some(result) = results.get_mut(slot.0 as usize) {
                result.error = Some(error);
            }
        }
        for drawn in output.tokens {
            let index = drawn.slot.0 as usize;
            let (Some(result), Some(request)) = (results.get_mut(index), requests.get(index)) else { continue };
            if result.finish.is_some() {
                continue; // Its end was seen when this token was under way.
            }
            result.tokens.push(drawn.token);
            result.logprobs.extend(drawn.logprobs);
            on_token(index, drawn.token);
            result.finish = finished(request, &result.tokens);
            if result.finish.is_some() {
                planner.end(drawn.slot.0);
            }
        }
    }
    Ok(results)
}

fn finished(request: &Request, tokens: &[u32]) -> Option<FinishReason> {
    if tokens.last().is_some_and(|token| request.stop_token_ids.contains(token)) {
        return Some(FinishReason::Stop);
    }
    (tokens.len() >= request.max_tokens).then_some(FinishReason::Length)
}
