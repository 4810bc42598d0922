//! How long a step takes on a device: a line through measured points. Must not know sequences.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a step computes, as far as its time depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Tokens of prompt chunks.
    pub prefill_tokens: u64,
    /// Sequences that compute one token behind their context.
    pub decodes: u64,
    /// Tokens in front of the decoded ones, summed: keys and values that are read.
    pub context_tokens: u64,
}

/// Time of a step as a sum, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    /// Every step: reading the weights, launches.
    pub fixed_ns: f64,
    /// Each prompt token: linears and prefill attention.
    pub prefill_token_ns: f64,
    /// Each decoding sequence: its share of linears, sampling.
    pub decode_ns: f64,
    /// Each context token of a decoding sequence: one read of its keys and values.
    pub context_token_ns: f64,
}

impl CostModel {
    /// Qwen3-4B, bf16, on one H200, fitted to vLLM 0.25.1's rows in the brief's performance.md:
    /// 1 / 274 tok/s at n1; 1 / 68,646 tok/s of prefill (16 x 4,096, attention included); 147,456 B of keys and values a
    /// token (36 layers, 8 heads of 128, two of them, bf16) at 4.3 TB/s; the rest of a decode from n256 512/256.
    pub const H200_QWEN3_4B: Self =
        Self { fixed_ns: 3_600_000.0, prefill_token_ns: 14_567.0, decode_ns: 9_000.0, context_token_ns: 34.3 };

    /// Time of one step.
    pub fn step_time(&self, load: Load) -> Duration {
        let ns = self.fixed_ns
            + self.prefill_token_ns * load.prefill_tokens as f64
            + self.decode_ns * load.decodes as f64
            + self.context_token_ns * load.context_tokens as f64;
        Duration::from_nanos(ns as u64)
    }
}
