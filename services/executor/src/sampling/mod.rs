//! From one row of logits to one token, on the host. Order of steps: transformers' `generate` (models.md §6): logit bias,
//! repetition penalty, presence and frequency penalties; then, unless greedy, temperature, top-k, top-p, min-p and a draw.
//! A row's result depends on its logits, its sequence's history, and (seed, answer position) alone.

mod filters;
mod history;
pub mod philox;

use millrace_kernels::Draw;
use millrace_protocol::sampling::{ResolvedSampling, TokenLogprobs};

pub use history::History;

/// A row that holds NaN or an infinity: the sequence cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite;

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// Log-probabilities after the processors, before temperature and filters, if asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// What a device needs to draw token `position` of an answer by itself; `None` if something changes the logits first or
/// log-probabilities are asked for.
pub fn device_draw(sampling: &ResolvedSampling, position: u64) -> Option<Draw> {
    let plain = sampling.logprobs.is_none()
        && sampling.logit_bias.is_empty()
        && sampling.repetition_penalty == 1.0
        && sampling.presence_penalty == 0.0
        && sampling.frequency_penalty == 0.0;
    let &ResolvedSampling { temperature, top_k, top_p, min_p, seed, .. } = sampling;
    let top_k = i32::try_from(top_k).unwrap_or(0);
    let drawn = || Draw { uniform: philox::uniform(seed, position), temperature, top_p, min_p, top_k };
    plain.then(|| if temperature > 0.0 { drawn() } else { Draw::GREEDY })
}

/// Draws token `position` (counted from 0) of an answer from `logits [V]`, which are overwritten.
///
/// # Errors
/// [`NotFinite`] if the model gave something that is no number, or a penalty made it so.
pub fn draw(
    logits: &mut [f32],
    sampling: &ResolvedSampling,
    history: &History,
    position: u64,
) -> Result<Drawn, NotFinite> {
    process(logits, sampling, history);
    if logits.is_empty() || logits.iter().any(|logit| !logit.is_finite()) {
        return Err(NotFinite);
    }
    let greedy = argmax(logits);
    let token = if sampling.temperature <= 0.0 {
        greedy
    } else {
        let kept = filters::keep(logits, sampling);
        filters::choose(&kept, philox::uniform(sampling.seed, position))
    };
    let logprobs = sampling.logprobs.map(|count| logprobs(logits, token, greedy, count));
    Ok(Drawn { token, logprobs })
}

/// Logit bias and penalties.
fn process(logits: &mut [f32], sampling: &ResolvedSampling, history: &History) {
    let at = |id: u32| usize::try_from(id).unwrap_or(usize::MAX);
    for &(id, bias) in &sampling.logit_bias {
        if let Some(logit) = logits.get_mut(at(id)) {
            *logit += bias;
        }
    }
    if sampling.repetition_penalty != 1.0 {
        for id in history.seen() {
            if let Some(logit) = logits.get_mut(at(id)) {
                let penalty = sampling.repetition_penalty;
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        for (id, count) in history.answered() {
            if let Some(logit) = logits.get_mut(at(id)) {
                *logit -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
            }
        }
    }
}

/// Lowest index among the maxima, as `torch.argmax` gives.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    let mut highest = f32::NEG_INFINITY;
    for (id, &logit) in (0u32..).zip(logits) {
        if logit > highest {
            (best, highest) = (id, logit);
        }
    }
    best
}

/// `log_softmax` at the chosen token and at the `count` likeliest (ties: lowest id first). Summed in f64.
fn logprobs(logits: &[f32], chosen: u32, greedy: u32, count: u32) -> TokenLogprobs {
    let value = |id: u32| f64::from(logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY));
    let highest = value(greedy);
    let log_sum = logits.iter().map(|&logit| (f64::from(logit) - highest).exp()).sum::<f64>().ln();
    let log_probability = |id: u32| (value(id) - highest - log_sum) as f32;
    let top = filters::likeliest(logits, count as usize);
    let top = top.into_iter().map(|id| (id, log_probability(id))).collect();
    TokenLogprobs { chosen: log_probability(chosen), top }
}

#[cfg(test)]
mod tests;
