//! Writes a checkpoint of random weights in the official layout, for benchmarks and tests without the real one. Names and
//! shapes are those that the model file asks for, so there is no second list of them.

mod shards;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use millrace_kernels::CpuBackend;
use serde_json::{Value, json};

use crate::checkpoint::{Fields, Loader, TensorSource};
use crate::error::ExecutorError;
use crate::models;
use crate::sampling::philox::philox4x32;
use shards::Shards;

/// Standard deviation of matrices and tables (`initializer_range` of all four families).
const STANDARD_DEVIATION: f64 = 0.02;

/// Blocks of four values that are worth a thread.
const LEAST_BLOCKS: usize = 1 << 14;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomOptions {
    /// Decoder layers instead of the config's number.
    pub layers: Option<usize>,
    /// The same seed gives the same bytes.
    pub seed: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomSummary {
    /// Tensors.
    pub tensors: usize,
    /// Parameters.
    pub parameters: u64,
    /// Bytes of weights.
    pub bytes: u64,
}

/// Writes config.json and bf16 weights for the config of directory `from` into directory `to`, which must exist: matrices
/// normal with deviation 0.02, norms 1, biases 0 (a router's stays f32). The model is built once on the way, so that what is
/// written also loads; it must fit into memory.
///
/// # Errors
/// A config that no model file takes, or files that cannot be written.
pub fn write_random(from: &Path, to: &Path, options: &RandomOptions) -> Result<RandomSummary, ExecutorError> {
    let path = from.join("config.json");
    let text = std::fs::read(&path).map_err(|source| ExecutorError::Io { path: path.clone(), source })?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|error| ExecutorError::Malformed { path: path.clone(), what: error.to_string() })?;
    if let Some(layers) = options.layers {
        cut_layers(&mut config, layers);
    }
    // A draft layer is left out by the model, so none is written.
    if let Some(drafts) = config.get_mut("num_nextn_predict_layers") {
        *drafts = json!(0);
    }
    let fields = Fields::root(&config)?;
    let architecture = fields.texts("architectures")?.into_iter().next().unwrap_or_default();
    let backend = CpuBackend::new(DType::BF16)?;
    let mut source = Generator { seed: options.seed, shards: Shards::new(to) };
    models::build(&architecture, &fields, &mut Loader::new(&mut source, &backend))?;
    let summary = source.shards.finish()?;
    let path = to.join("config.json");
    std::fs::write(&path, format!("{config:#}\n")).map_err(|source| ExecutorError::Io { path, source })?;
    Ok(summary)
}

/// Sets the number of decoder layers wherever it stands, and takes out what belongs to layers that are gone.
fn cut_layers(config: &mut Value, layers: usize) {
    let nested = config.get("text_config").is_some();
    let text = if nested { config.get_mut("text_config") } else { Some(&mut *config) };
    let Some(text) = text.and_then(Value::as_object_mut) else { return };
    text.insert("num_hidden_layers".into(), json!(layers));
    if let Some(kinds) = text.get_mut("mlp_layer_types").and_then(Value::as_array_mut) {
        kinds.truncate(layers);
    }
}

/// A source in which every tensor is found: it is made when it is asked for.
struct Generator {
    seed: u64,
    shards: Shards,
}

impl TensorSource for Generator {
    /// Asked only for alternative layouts, of which the first is written.
    fn has(&self, _name: &str) -> bool {
        false
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ExecutorError> {
        let tensor = tensor(self.seed, name, shape).map_err(ExecutorError::candle)?;
        self.shards.push(name, tensor.clone())?;
        Ok(tensor)
    }

    fn leave_out(&mut self, _prefix: &str) -> usize {
        0
    }
}

fn tensor(seed: u64, name: &str, shape: &[usize]) -> candle_core::Result<Tensor> {
    if name.ends_with("e_score_correction_bias") {
        return Tensor::zeros(shape, DType::F32, &Device::Cpu);
    }
    if name.ends_with("bias") {
        return Tensor::zeros(shape, DType::BF16, &Device::Cpu);
    }
    if shape.len() == 1 {
        return Tensor::ones(shape, DType::BF16, &Device::Cpu);
    }
    let digest = blake3::hash(name.as_bytes());
    let words = digest.as_bytes().as_chunks::<4>().0;
    let [low, high] = [0, 1].map(|n| words.get(n).map_or(0, |word| u32::from_le_bytes(*word)));
    let key = [seed as u32, (seed >> 32) as u32];
    let count: usize = shape.iter().product();
    let mut values = vec![bf16::ZERO; count];
    let fill = |first: usize, part: &mut [bf16]| {
        for (block, four) in (first as u64..).zip(part.chunks_mut(4)) {
            let made = normals(philox4x32(key, [block as u32, (block >> 32) as u32, low, high]));
            four.iter_mut().zip(made).for_each(|(to, value)| *to = value);
        }
    };
    // A value depends on its place alone, so every core makes a run of blocks of four.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let blocks = count.div_ceil(4).div_ceil(threads).max(LEAST_BLOCKS);
    std::thread::scope(|scope| {
        for (run, part) in values.chunks_mut(4 * blocks).enumerate() {
            scope.spawn(move || fill(run * blocks, part));
        }
    });
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Four normal numbers out of four random words (Box-Muller).
fn normals(words: [u32; 4]) -> [bf16; 4] {
    let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    let pair = |a: u32, b: u32| {
        let radius = STANDARD_DEVIATION * (-2.0 * unit(a).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * unit(b)).sin_cos();
        [bf16::from_f64(radius * cos), bf16::from_f64(radius * sin)]
    };
    let ([a, b], [c, d]) = (pair(words[0], words[1]), pair(words[2], words[3]));
    [a, b, c, d]
}

#[cfg(test)]
mod tests;
