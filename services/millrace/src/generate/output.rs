//! What `millrace generate` prints and writes.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context;
use millrace_executor::RowLogits;
use millrace_protocol::output::{FinishReason, Usage};
use millrace_protocol::sampling::TokenLogprobs;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Serialize;

/// The last line of `--json`.
#[derive(Debug, Serialize)]
pub struct Answer {
    /// The answer's tokens; an end-of-text token is counted in `usage` but not listed.
    pub token_ids: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: Option<FinishReason>,
    /// With `--logprobs`: one entry for each drawn token.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprobs>,
    /// Token counts.
    pub usage: Usage,
    /// Durations.
    pub timings: Timings,
}

/// Durations in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Timings {
    /// Loading the model.
    pub load_ms: f64,
    /// Decoding, resizing, templating and tokenising.
    pub preprocess_ms: f64,
    /// From the first step to the first token.
    pub first_token_ms: f64,
    /// From the first step to the end.
    pub total_ms: f64,
}

/// Writes logits as safetensors: `logits`, f32 `[rows, vocabulary]`, and `index`, i64 `[rows]`: the place in the
/// sequence of the token whose logits a row was computed from.
///
/// # Errors
/// Rows of different lengths, or the file cannot be written.
pub fn write_logits(path: &Path, mut rows: Vec<RowLogits>) -> anyhow::Result<()> {
    rows.sort_by_key(|row| row.index);
    let vocab = rows.first().map_or(0, |row| row.logits.len());
    anyhow::ensure!(rows.iter().all(|row| row.logits.len() == vocab), "rows of logits differ in length");
    let logits: Vec<u8> = rows.iter().flat_map(|row| row.logits.iter().flat_map(|value| value.to_le_bytes())).collect();
    let index: Vec<u8> = rows.iter().flat_map(|row| (row.index as i64).to_le_bytes()).collect();
    let tensors = HashMap::from([
        ("logits", TensorView::new(Dtype::F32, vec![rows.len(), vocab], &logits)?),
        ("index", TensorView::new(Dtype::I64, vec![rows.len()], &index)?),
    ]);
    safetensors::serialize_to_file(tensors, None, path).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_are_written_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logits.safetensors");
        let row = |index: usize, logits: [f32; 2]| RowLogits { slot: 0, index, logits: logits.to_vec() };
        write_logits(&path, vec![row(1, [3.0, 4.0]), row(0, [1.0, 2.0])]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("logits").unwrap();
        assert_eq!(logits.shape(), [2, 2]);
        let values: Vec<f32> =
            logits.data().chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0]);
        assert!(
            write_logits(&path, vec![row(0, [1.0, 2.0]), RowLogits { slot: 0, index: 1, logits: vec![1.0] }]).is_err()
        );
    }
}
