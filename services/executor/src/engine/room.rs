//! What of a device's memory goes to what: checked before loading, rehearsed before the KV pool is made, and said in one
//! sentence where it does not fit. Devices without memory of their own have nothing to check.

use bytes::Bytes;
use millrace_kernels::{Backend, DeviceMemory, KernelError, MemoryKind, Ragged, StepInputs};
use millrace_protocol::PageDtype;

use super::{KvBudget, LoadOptions};
use crate::error::{ExecutorError, MemoryShortage};
use crate::layers::vision::{PatchGrid, VisionFeatures};
use crate::models::{Model, PatchSpec};
use crate::step_batch::{StepBatch, VisionRows};

/// Kept free behind the KV pool: recorded steps, code that the driver and cuBLASLt load on first use, and features that outlive
/// a step. Activations are not in it: the rehearsal has taken them by then.
pub(super) const RESERVE_BYTES: u64 = 1 << 30;
/// Most patches of the rehearsal: a larger `step_patches` is only a limit for planning.
const MOST_PATCHES: usize = 1 << 16;

/// What is known of the sum while loading.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Bytes of all weights in the device's precision.
    pub weights_bytes: u64,
    /// Bytes of the KV pool, 0 as long as they are not known.
    kv_bytes: u64,
}

impl Room {
    /// Errors if weights, the pool that is asked for and the reserve are more than is free; before anything is loaded.
    pub fn check<B: Backend>(backend: &B, weights_bytes: u64, options: &LoadOptions) -> Result<Self, ExecutorError> {
        let kv_bytes = if let KvBudget::Bytes(bytes) = options.kv { bytes } else { 0 };
        let room = Self { weights_bytes, kv_bytes };
        if let Some(reader) = backend.memory_reader() {
            let memory = reader()?;
            let asked =
                [weights_bytes, kv_bytes, RESERVE_BYTES].iter().fold(0u64, |sum, more| sum.saturating_add(*more));
            if asked > memory.free_bytes {
                return Err(room.shortage(RESERVE_BYTES, &memory));
            }
        }
        Ok(room)
    }

    /// The same once the weights are on the device.
    pub fn after_loading<B: Backend>(backend: &B, options: &LoadOptions) -> Result<Self, ExecutorError> {
        let kv_bytes = if let KvBudget::Bytes(bytes) = options.kv { bytes } else { 0 };
        let memory = backend.memory_reader().map(|reader| reader()).transpose()?.unwrap_or_default();
        Ok(Self { weights_bytes: memory.of(MemoryKind::Weights), kv_bytes })
    }

    /// An error of loading: out of device memory becomes the sum of what is asked for.
    pub fn explain(&self, error: ExecutorError) -> ExecutorError {
        match error {
            ExecutorError::Kernel(KernelError::OutOfMemory { asked_bytes, memory, kind }) => {
                let beside = memory.workspace_bytes() + RESERVE_BYTES;
                let more = if matches!(kind, MemoryKind::Weights | MemoryKind::KvPool) { 0 } else { asked_bytes };
                self.shortage(beside + more, &memory)
            }
            other => other,
        }
    }

    /// `workspace_bytes` more than the weights and the pool need. What this process holds already counts as free.
    fn shortage(&self, workspace_bytes: u64, memory: &DeviceMemory) -> ExecutorError {
        let held: u64 = memory.held.iter().sum();
        ExecutorError::DeviceMemory(Box::new(MemoryShortage {
            weights_bytes: self.weights_bytes,
            kv_bytes: self.kv_bytes,
            workspace_bytes,
            free_bytes: memory.free_bytes.saturating_add(held).min(memory.total_bytes),
            total_bytes: memory.total_bytes,
        }))
    }

    /// The KV pool: its blocks, and the caches of all layers. On a device with memory of its own the largest step is rehearsed
    /// first, so that its activations have their place before the pool takes the rest.
    ///
    /// # Errors
    /// Options that do not fit, no room.
    pub fn pool<B: Backend>(
        mut self,
        backend: &B,
        model: &mut dyn Model<B>,
        options: &LoadOptions,
    ) -> Result<(u32, Vec<B::KvCache>), ExecutorError> {
        let (elements, block_tokens) = (model.spec().kv_elements, options.block_tokens as usize);
        let Some(reader) = backend.memory_reader() else {
            let blocks = options.blocks(elements, None)?;
            return Ok((blocks, model.kv_caches(backend, blocks as usize, block_tokens)?));
        };
        rehearse(backend, model, options).map_err(|error| self.explain(error))?;
        // Once more in one piece of memory: what does not fit there finds its place now, not in service.
        backend.join_memory()?;
        rehearse(backend, model, options).map_err(|error| self.explain(error))?;
        let memory = reader()?;
        let room = memory.free_bytes.saturating_sub(RESERVE_BYTES);
        if room < options.block_bytes(elements) {
            self.kv_bytes = self.kv_bytes.max(options.block_bytes(elements));
            return Err(self.shortage(memory.workspace_bytes() + RESERVE_BYTES, &memory));
        }
        let blocks = options.blocks(elements, Some(room))?;
        self.kv_bytes = u64::from(blocks).saturating_mul(options.block_bytes(elements));
        if self.kv_bytes > room {
            return Err(self.shortage(memory.workspace_bytes() + RESERVE_BYTES, &memory));
        }
        let caches = model.kv_caches(backend, blocks as usize, block_tokens).map_err(|error| self.explain(error))?;
        Ok((blocks, caches))
    }
}

/// Runs the largest step over a pool of one block: the vision tower over a step's patches, then all rows that a step may have,
/// as many of them vision rows as there are, and logits of as many as there are slots.
fn rehearse<B: Backend>(backend: &B, model: &mut dyn Model<B>, options: &LoadOptions) -> Result<(), ExecutorError> {
    let spec = model.spec().clone();
    let (block_tokens, rows) = (options.block_tokens.max(1) as usize, options.step_tokens.max(1) as usize);
    let vision = match spec.vision {
        Some(patches) => Some(rehearse_vision(backend, model, &patches, options, rows)?),
        None => None,
    };
    let mut caches = model.kv_caches(backend, 1, block_tokens)?;
    let logit_rows = if options.keep_logits { rows } else { rows.min(options.slots as usize) };
    let positions = spec.max_tokens.max(1);
    let ragged = Ragged {
        query_start: vec![0, rows as u32],
        context: vec![rows as u32],
        blocks: vec![vec![0; rows.div_ceil(block_tokens)]],
    };
    let inputs = StepInputs {
        ids: vec![0; rows],
        positions: (0..rows).map(|n| [(n % positions) as u32; 3]).collect(),
        ragged,
        block_tokens,
        logit_rows: (0..logit_rows as u32).collect(),
        replayable: false,
    };
    let vision = vision.as_ref();
    let forward = &mut |staged: &_| model.forward(backend, &StepBatch { staged, vision }, &mut caches);
    backend.step::<ExecutorError>(inputs, forward)?;
    // The pool of one block must not go before.
    Ok(backend.wait()?)
}

/// Features of two items that fill a step, joined as a step joins them, for the first of `rows` rows.
fn rehearse_vision<B: Backend>(
    backend: &B,
    model: &dyn Model<B>,
    patches: &PatchSpec,
    options: &LoadOptions,
    rows: usize,
) -> Result<VisionRows<B>, ExecutorError> {
    let PatchSpec { channels, patch, merge, .. } = *patches;
    // Two merged rows high, as wide as it takes.
    let height = 2 * merge.max(1);
    let width = ((options.step_patches as usize).min(MOST_PATCHES) / (2 * height))
        .next_multiple_of(merge.max(1))
        .max(merge.max(1));
    let grid = PatchGrid {
        grid_h: u32::try_from(height).unwrap_or(u32::MAX),
        grid_w: u32::try_from(width).unwrap_or(u32::MAX),
        bytes: Bytes::from(vec![0; height * width * channels * patch * patch * 2]),
        dtype: PageDtype::Bf16,
        slots: 1,
        normalise: None,
    };
    let parts = model.encode(backend, &[grid.clone(), grid])?;
    // What outlives a step has its place too: a step's features, and the cache full of others.
    let bytes: usize = parts.iter().flat_map(VisionFeatures::parts).map(|part| backend.tensor_bytes(part)).sum();
    let cached = options.encoder_device_bytes.div_ceil(bytes.max(1) as u64);
    let mut kept = Vec::new();
    for part in (0..=cached).flat_map(|_| &parts) {
        kept.push(part.keep(backend)?);
    }
    let none = || ExecutorError::Unsupported("a vision tower that gives no features".into());
    let features = VisionFeatures::concat(backend, parts)?.ok_or_else(none)?;
    let count = backend.shape(&features.embeddings).first().copied().unwrap_or(0).min(rows);
    let rows = backend.indices((0..count as u32).collect())?;
    Ok(VisionRows { rows, features: features.row_range(backend, 0..count)? })
}
