//! What a caller decides about an engine, and how one is made from a model directory.

use std::path::Path;

use millrace_kernels::{Backend, CpuBackend};
use millrace_protocol::{ActorId, ModelName};
use millrace_runtime::Clock;

use super::room::Room;
use super::{Engine, StepEngine, cuda};
use crate::checkpoint::Checkpoint;
use crate::error::ExecutorError;
use crate::models;

/// Where an engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// The host's processor.
    Cpu,
    /// The CUDA device of this ordinal; only bf16.
    Cuda(usize),
}

impl DeviceKind {
    /// The first CUDA device if this build and this machine have one, else the processor; and why not, if not.
    pub fn best() -> (Self, Option<String>) {
        match cuda::probe(0) {
            Ok(()) => (Self::Cuda(0), None),
            Err(error) => (Self::Cpu, Some(error.to_string())),
        }
    }

    /// The precision that models run in here unless told otherwise.
    pub fn default_dtype(self) -> Dtype {
        match self {
            Self::Cpu => Dtype::F32,
            Self::Cuda(_) => Dtype::Bf16,
        }
    }
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Element type of weights, activations and caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bits: the reference.
    F32,
    /// bfloat16, rounded where transformers rounds.
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn candle(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
        }
    }
}

/// The KV pool on the CPU unless told otherwise.
const CPU_KV_BYTES: u64 = 512 << 20;

/// Vision features on the device unless told otherwise.
pub const ENCODER_DEVICE_BYTES: u64 = 128 << 20;

/// Size of the KV pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvBudget {
    /// As the device has room: what weights and workspace leave free, 512 MiB on the CPU.
    Auto,
    /// As many blocks as fit.
    Bytes(u64),
    /// That many blocks.
    Blocks(u32),
}

/// Options of an engine.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// Repeated in every output.
    pub executor: ActorId,
    /// Name under which the model is served.
    pub model: ModelName,
    /// Where to compute.
    pub device: DeviceKind,
    /// In which precision.
    pub dtype: Dtype,
    /// Size of the KV pool.
    pub kv: KvBudget,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Slots for sequences.
    pub slots: u32,
    /// Most tokens of one step.
    pub step_tokens: u32,
    /// Most vision patches of one step, for the scheduler's planning.
    pub step_patches: u32,
    /// Most bytes of vision features on the device, beside those that running sequences hold.
    pub encoder_device_bytes: u64,
    /// Host memory for vision features that left the device; 0: none.
    pub encoder_host_bytes: u64,
    /// Computes and keeps the logits of every row, for comparisons.
    pub keep_logits: bool,
}

impl LoadOptions {
    /// Options for one process that generates by itself: CPU, f32, blocks of 16 tokens, a pool of 4096 tokens, 8 slots.
    pub fn in_process(model: ModelName, executor: ActorId) -> Self {
        Self {
            executor,
            model,
            device: DeviceKind::Cpu,
            dtype: Dtype::F32,
            kv: KvBudget::Blocks(256),
            block_tokens: 16,
            slots: 8,
            step_tokens: 2048,
            step_patches: 16_384,
            encoder_device_bytes: ENCODER_DEVICE_BYTES,
            encoder_host_bytes: 0,
            keep_logits: false,
        }
    }

    /// Bytes of one block whose tokens take `kv_elements` elements each.
    pub(super) fn block_bytes(&self, kv_elements: usize) -> u64 {
        kv_elements as u64 * self.dtype.size_bytes() as u64 * u64::from(self.block_tokens)
    }

    /// Blocks of a pool whose tokens take `kv_elements` elements each, on a device with `room` bytes for it.
    pub(super) fn blocks(&self, kv_elements: usize, room: Option<u64>) -> Result<u32, ExecutorError> {
        for (option, value) in
            [("block_tokens", self.block_tokens), ("slots", self.slots), ("step_tokens", self.step_tokens)]
        {
            if value == 0 {
                return Err(ExecutorError::Option { option, what: "must be at least 1".into() });
            }
        }
        let block_bytes = self.block_bytes(kv_elements);
        let room = room.unwrap_or(CPU_KV_BYTES);
        let blocks = match self.kv {
            KvBudget::Blocks(blocks) => u64::from(blocks),
            KvBudget::Bytes(bytes) => bytes.checked_div(block_bytes).unwrap_or(0),
            KvBudget::Auto => room.checked_div(block_bytes).unwrap_or(0),
        };
        let fitting = u32::try_from(blocks).ok().filter(|blocks| *blocks > 0);
        fitting.ok_or_else(|| ExecutorError::Option {
            option: "kv",
            what: format!("holds {blocks} blocks of {block_bytes} bytes: between 1 and {} are possible", u32::MAX),
        })
    }
}

/// Loads the model of `dir` onto a device.
///
/// # Errors
/// A directory that is no supported checkpoint, or options that do not fit it.
pub fn load(dir: &Path, options: &LoadOptions) -> Result<Box<dyn StepEngine>, ExecutorError> {
    match options.device {
        DeviceKind::Cpu => {
            let backend = CpuBackend::new(options.dtype.candle())?;
            Ok(Box::new(load_on(dir, backend, options)?))
        }
        DeviceKind::Cuda(ordinal) => cuda::load(dir, ordinal, options),
    }
}

/// Loads the model of `dir` onto `backend`.
///
/// # Errors
/// As [`load`].
pub fn load_on<B: Backend + 'static>(
    dir: &Path,
    backend: B,
    options: &LoadOptions,
) -> Result<Engine<B>, ExecutorError> {
    let checkpoint = Checkpoint::open(dir)?;
    let weights_hash = checkpoint.weights_hash().to_string();
    let weight_bytes = checkpoint.elements().saturating_mul(options.dtype.size_bytes() as u64);
    let room = Room::check(&backend, weight_bytes, options)?;
    let clock = Clock::system();
    let started = clock.now();
    let model = models::load(checkpoint, &backend).map_err(|error| room.explain(error))?;
    backend.wait()?;
    let seconds = clock.now().saturating_duration_since(started).as_secs_f64();
    tracing::info!(weight_bytes, seconds, gb_per_s = weight_bytes as f64 / 1e9 / seconds.max(1e-9), "weights loaded");
    Engine::new(backend, model, weights_hash, options)
}
