//! A cheap identity of a checkpoint: enough to tell two apart without reading tens of gigabytes.

use super::Weights;
use crate::error::ExecutorError;

/// Places in each file from which bytes are taken, evenly spaced.
const SAMPLES: u64 = 64;
/// Bytes taken at each place.
const SAMPLE_BYTES: u64 = 4096;

/// Hash (BLAKE3, first 16 bytes as hex) of config.json, all tensor names with dtype and shape, file sizes, and
/// [`SAMPLES`] pieces of each file. Two checkpoints that differ only between the pieces share it: a fine-tune changes all of
/// a tensor, so that does not happen by accident.
pub(super) fn weights_hash(config: &[u8], weights: &Weights) -> Result<String, ExecutorError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(config);
    for line in weights.listing() {
        hasher.update(line.as_bytes());
        hasher.update(b"\n");
    }
    for file in weights.files() {
        hasher.update(&file.bytes().to_le_bytes());
        let stride = (file.bytes() / SAMPLES).max(SAMPLE_BYTES);
        let mut start = 0;
        while start < file.bytes() {
            let length = SAMPLE_BYTES.min(file.bytes() - start);
            hasher.update(&file.read(start, length as usize)?);
            start += stride;
        }
    }
    Ok(hasher.finalize().to_hex().chars().take(32).collect())
}
