//! generation_config.json, and how a job's wishes, the checkpoint's defaults and the reference's global defaults
//! become one set of sampling values: explicit > generation_config.json > global (transformers 5.17).

use std::path::Path;

use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ErrorCode, JobError, JobId, Sampling};
use serde::Deserialize;
use serde_json::Value;

use crate::error::LoadError;
use crate::model_files::{ModelFacts, ids, read_json_if_present};

/// The reference's global default for sampling when nobody sets `top_k`.
const DEFAULT_TOP_K: u32 = 50;
/// Most ids with a bias in one job.
const MAX_BIASES: usize = 1024;
/// Most alternatives with log-probabilities.
const MAX_LOGPROBS: u32 = 20;

/// The checkpoint's defaults.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Draw at random unless the job says otherwise.
    pub do_sample: bool,
    /// Default temperature.
    pub temperature: Option<f32>,
    /// Default `top_k`.
    pub top_k: Option<u32>,
    /// Default `top_p`.
    pub top_p: Option<f32>,
    /// Default `min_p`.
    pub min_p: Option<f32>,
    /// Default repetition penalty.
    pub repetition_penalty: Option<f32>,
    /// Default number of tokens to generate.
    pub max_new_tokens: Option<u32>,
    /// End-of-text ids.
    pub eos: Vec<u32>,
}

#[derive(Deserialize, Default)]
struct Raw {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<u32>,
    eos_token_id: Option<Value>,
}

impl GenerationConfig {
    /// Reads a checkpoint folder's file; without one, greedy with config.json's end-of-text ids.
    ///
    /// # Errors
    /// [`LoadError`] if the file is malformed.
    pub fn load(folder: &Path, facts: &ModelFacts) -> Result<Self, LoadError> {
        let path = folder.join("generation_config.json");
        let raw: Raw = read_json_if_present(&path)?.unwrap_or_default();
        let mut eos = ids(raw.eos_token_id.as_ref());
        if eos.is_empty() {
            eos.clone_from(&facts.eos);
        }
        Ok(Self {
            do_sample: raw.do_sample.unwrap_or(false),
            temperature: raw.temperature,
            top_k: raw.top_k,
            top_p: raw.top_p,
            min_p: raw.min_p,
            repetition_penalty: raw.repetition_penalty,
            max_new_tokens: raw.max_new_tokens,
            eos,
        })
    }

    /// Decides every sampling value of a job. `vocab` bounds the biased ids.
    ///
    /// # Errors
    /// `invalid_value` naming the field and its range, `token_range` for a biased id outside the vocabulary.
    pub fn resolve(&self, wish: &Sampling, job: &JobId, vocab: u32) -> Result<ResolvedSampling, JobError> {
        check(wish, vocab)?;
        let default_temperature = if self.do_sample { self.temperature.unwrap_or(1.0) } else { 0.0 };
        let temperature = wish.temperature.unwrap_or(default_temperature);
        let greedy = temperature == 0.0;
        // Filters are of no effect on the argmax; off, they cost nothing.
        let filter = |value: f32, off: f32| if greedy { off } else { value };
        Ok(ResolvedSampling {
            temperature,
            top_k: if greedy { 0 } else { wish.top_k.or(self.top_k).unwrap_or(DEFAULT_TOP_K) },
            top_p: filter(wish.top_p.or(self.top_p).unwrap_or(1.0), 1.0),
            min_p: filter(wish.min_p.or(self.min_p).unwrap_or(0.0), 0.0),
            repetition_penalty: wish.repetition_penalty.or(self.repetition_penalty).unwrap_or(1.0),
            presence_penalty: wish.presence_penalty.unwrap_or(0.0),
            frequency_penalty: wish.frequency_penalty.unwrap_or(0.0),
            logit_bias: wish.logit_bias.iter().map(|(&id, &bias)| (id, bias)).collect(),
            seed: wish.seed.unwrap_or_else(|| seed_of(job)),
            logprobs: wish.logprobs,
        })
    }
}

/// The same job draws the same tokens, also after a redelivery.
fn seed_of(job: &JobId) -> u64 {
    let mut first = [0u8; 8];
    first.copy_from_slice(&blake3::hash(job.as_str().as_bytes()).as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Checks the ranges of a job's wishes.
pub(crate) fn check(wish: &Sampling, vocab: u32) -> Result<(), JobError> {
    let within = |field: &str, value: Option<f32>, fits: fn(f32) -> bool, range: &str| match value {
        Some(value) if !fits(value) => Err(invalid(format!("sampling.{field} is {value}; it must be {range}"))),
        _ => Ok(()),
    };
    within(
        "temperature",
        wish.temperature,
        |v| v == 0.0 || (0.001..=100.0).contains(&v),
        "0 (greedy) or 0.001 to 100",
    )?;
    within("top_p", wish.top_p, |v| v > 0.0 && v <= 1.0, "above 0 and at most 1")?;
    within("min_p", wish.min_p, |v| (0.0..=1.0).contains(&v), "0 to 1")?;
    within("repetition_penalty", wish.repetition_penalty, |v| v > 0.0 && v <= 100.0, "above 0 and at most 100")?;
    within("presence_penalty", wish.presence_penalty, |v| (-100.0..=100.0).contains(&v), "-100 to 100")?;
    within("frequency_penalty", wish.frequency_penalty, |v| (-100.0..=100.0).contains(&v), "-100 to 100")?;
    if wish.logprobs.is_some_and(|n| n > MAX_LOGPROBS) {
        return Err(invalid(format!("sampling.logprobs is at most {MAX_LOGPROBS}")));
    }
    if wish.logit_bias.len() > MAX_BIASES {
        return Err(invalid(format!(
            "sampling.logit_bias has {} entries; at most {MAX_BIASES}",
            wish.logit_bias.len()
        )));
    }
    if let Some((id, bias)) = wish.logit_bias.iter().find(|(_, bias)| !(-1000.0..=1000.0).contains(*bias)) {
        return Err(invalid(format!("sampling.logit_bias[{id}] is {bias}; it must be -1000 to 1000")));
    }
    match wish.logit_bias.keys().find(|&&id| id >= vocab) {
        None => Ok(()),
        Some(id) => {
            let text =
                format!("sampling.logit_bias names token {id}; the model has ids 0 to {}", vocab.saturating_sub(1));
            Err(JobError::new(ErrorCode::TokenRange, text))
        }
    }
}

fn invalid(text: String) -> JobError {
    JobError::new(ErrorCode::InvalidValue, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> JobId {
        JobId::new("clip-42").unwrap()
    }

    fn resolve(config: &GenerationConfig, wish: Sampling) -> Result<ResolvedSampling, JobError> {
        config.resolve(&wish, &job(), 1000)
    }

    #[test]
    fn a_silent_checkpoint_is_greedy() {
        let got = resolve(&GenerationConfig::default(), Sampling { seed: Some(0), ..Sampling::default() }).unwrap();
        assert_eq!(got, ResolvedSampling::greedy());
    }

    #[test]
    fn sampling_without_top_k_uses_fifty() {
        let config = GenerationConfig { do_sample: true, ..GenerationConfig::default() };
        let got = resolve(&config, Sampling::default()).unwrap();
        assert_eq!((got.temperature, got.top_k, got.top_p), (1.0, 50, 1.0));
        let got = resolve(&config, Sampling { top_k: Some(0), ..Sampling::default() }).unwrap();
        assert_eq!(got.top_k, 0);
    }

    #[test]
    fn the_job_goes_before_the_checkpoint() {
        let config = GenerationConfig {
            do_sample: true,
            temperature: Some(0.7),
            top_k: Some(20),
            top_p: Some(0.8),
            repetition_penalty: Some(1.05),
            ..GenerationConfig::default()
        };
        let got = resolve(&config, Sampling { top_p: Some(0.5), ..Sampling::default() }).unwrap();
        assert_eq!((got.temperature, got.top_k, got.top_p, got.repetition_penalty), (0.7, 20, 0.5, 1.05));
        let got = resolve(&config, Sampling { temperature: Some(0.0), ..Sampling::default() }).unwrap();
        assert_eq!((got.temperature, got.top_k, got.top_p, got.repetition_penalty), (0.0, 0, 1.0, 1.05));
        let not_sampling = GenerationConfig { do_sample: false, ..config };
        assert_eq!(resolve(&not_sampling, Sampling::default()).unwrap().temperature, 0.0);
    }

    #[test]
    fn the_seed_follows_the_job() {
        let config = GenerationConfig::default();
        let seed = |id: &str| config.resolve(&Sampling::default(), &JobId::new(id).unwrap(), 9).unwrap().seed;
        assert_eq!(seed("a"), seed("a"));
        assert_ne!(seed("a"), seed("b"));
    }

    #[test]
    fn every_bad_value_is_named() {
        let bad = |set: fn(&mut Sampling), field: &str| {
            let mut wish = Sampling::default();
            set(&mut wish);
            let error = resolve(&GenerationConfig::default(), wish).unwrap_err();
            assert!(error.message.contains(field), "{error}");
            error.code
        };
        for code in [
            bad(|s| s.temperature = Some(-1.0), "sampling.temperature"),
            bad(|s| s.temperature = Some(f32::NAN), "sampling.temperature"),
            bad(|s| s.temperature = Some(1e-9), "sampling.temperature"),
            bad(|s| s.top_p = Some(0.0), "sampling.top_p"),
            bad(|s| s.top_p = Some(1.1), "sampling.top_p"),
            bad(|s| s.min_p = Some(-0.1), "sampling.min_p"),
            bad(|s| s.repetition_penalty = Some(0.0), "sampling.repetition_penalty"),
            bad(|s| s.presence_penalty = Some(f32::INFINITY), "sampling.presence_penalty"),
            bad(|s| s.frequency_penalty = Some(101.0), "sampling.frequency_penalty"),
            bad(|s| s.logprobs = Some(21), "sampling.logprobs"),
            bad(|s| s.logit_bias = [(3, f32::NAN)].into(), "sampling.logit_bias[3]"),
        ] {
            assert_eq!(code, ErrorCode::InvalidValue);
        }
        assert_eq!(bad(|s| s.logit_bias = [(1000, 1.0)].into(), "1000"), ErrorCode::TokenRange);
    }
}
