//! A cheap identity of a checkpoint: enough to tell two apart without reading tens of gigabytes.

use super::Weights;
use crate::error::ExecutorError;

/// Places in each file from which bytes are taken, evenly spaced.
const SAMPLES: usize = 64;
/// Bytes taken at each place.
const SAMPLE_BYTES: usize = 4096;

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
        let bytes = file.bytes();
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        let stride = (bytes.len() / SAMPLES).max(SAMPLE_BYTES);
        for piece in bytes.chunks(stride) {
            hasher.update(&piece[..SAMPLE_BYTES.min(piece.len())]);
        }
    }
    Ok(hasher.finalize().to_hex().chars().take(32).collect())
}
