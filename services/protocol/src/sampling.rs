//! How the next token is chosen; names and order of application follow Hugging Face's `generate`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A publisher's wishes; what is absent comes from the checkpoint's generation_config.json.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// 0 means greedy. Otherwise logits are divided by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Keep the k most likely tokens (ties at the k-th are kept); 0 keeps all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Keep the smallest set of tokens whose probability reaches this, in (0, 1].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one, in [0, 1].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of every token seen in prompt or answer; 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logit of every token that the answer already holds; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// Subtracted once for each time the answer already holds the token; 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these token ids.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Makes the random draws repeatable: token n depends on (seed, n) and the logits alone.
    /// Absent: derived from the job's id, so that a redelivered job draws the same tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Also report this many most likely tokens with their log-probabilities, at most 20.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
}

/// What an executor needs to draw tokens: every value decided, ranges checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResolvedSampling {
    /// 0 means greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// Added to these logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Counter-based randomness starts here.
    pub seed: u64,
    /// Number of alternatives to report with log-probabilities; `None` reports nothing.
    pub logprobs: Option<u32>,
}

impl ResolvedSampling {
    /// Greedy, nothing else switched on.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// Log-probability of a chosen token and of the likeliest alternatives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TokenLogprobs {
    /// ln p of the chosen token, after the processors and before any filter (temperature 1).
    pub chosen: f32,
    /// (token id, ln p), most likely first.
    pub top: Vec<(u32, f32)>,
}
