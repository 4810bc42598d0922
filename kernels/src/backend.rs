//! The vocabulary that model files are written against.
//!
//! Rounding: with bf16 tensors every op rounds exactly where Hugging Face's eager code rounds (round to nearest even after
//! f32 accumulation); with f32 tensors nothing is rounded. Each method names its rounding points. Empty problems (zero
//! rows) are `Ok`. Shapes are checked before any work; a mismatch is [`KernelError::Shape`] that names the op.

use std::ops::Range;

use candle_core::DType;

use crate::device_memory::MemoryReader;
use crate::error::KernelError;
use crate::grid::PatchGrids;
use crate::host_memory::HostMemory;
use crate::mapped::{MappedFile, mapped_tensor};
use crate::patches::PatchPage;
use crate::step::{Draw, Finished, Forward, StepInputs};

/// Which GELU: transformer blocks of the vision tower use tanh, its mergers erf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GeluKind {
    /// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    Tanh,
    /// 0.5 x (1 + erf(x / sqrt 2))
    Erf,
}

/// Rotation angles of one ragged batch, gathered from the cached table for each token.
#[derive(Debug, Clone)]
pub struct RopeTable<T> {
    /// cos, shape [tokens, head_dim / 2], rounded to the model's dtype.
    pub cos: T,
    /// sin, same shape.
    pub sin: T,
}

/// Bidirectional attention segments of the vision tower: rows `start[i]..start[i + 1]` see each other only.
#[derive(Debug, Clone, Default)]
pub struct Segments {
    /// Prefix sums of rows, length segments + 1.
    pub start: Vec<u32>,
}

/// How [`Backend::router_sigmoid`] chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SigmoidChoice {
    /// Experts for each token.
    pub top_k: usize,
    /// Equal groups that the experts are split into.
    pub groups: usize,
    /// Groups kept: those with the largest sum of their two best biased scores.
    pub top_groups: usize,
    /// Whether weights are divided by their sum.
    pub norm_topk: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// Fused operations over one device's tensors.
///
/// `T` is tokens of the ragged batch, `H` hidden size, `D` head size, `Hq`/`Hkv` query and key heads.
pub trait Backend: Send + Sync + Sized {
    /// A tensor on this device; cloning shares storage.
    type Tensor: Clone + Send + Sync + std::fmt::Debug;
    /// Keys and values (or latents) of one layer: the block pool.
    type KvCache: Send;
    /// Which experts each token goes to, and with what weights.
    type Routing: Send;
    /// A list of row numbers or token ids on the device.
    type Indices: Clone + Send + Sync + std::fmt::Debug;
    /// A [`Ragged`] batch on the device.
    type Batch: Clone + Send + std::fmt::Debug;
    /// Frequencies of a rotation on the device.
    type Frequencies: Send + Sync + std::fmt::Debug;
    /// Angles and segments of one run of a vision tower on the device.
    type Geometry: Send + std::fmt::Debug;
    /// Logits of one step, until the next step begins.
    type Logits: Send + std::fmt::Debug;
    /// A step under way, from [`Self::finish`] to [`Self::finished`].
    type Flight: Send + std::fmt::Debug;

    /// Element type of activations and weights.
    fn dtype(&self) -> candle_core::DType;

    /// Bytes free on a device that has memory of its own.
    fn free_bytes(&self) -> Result<Option<u64>, KernelError>;

    /// A reader of what the device's memory holds; `None` on a device without memory of its own.
    fn memory_reader(&self) -> Option<MemoryReader> {
        None
    }

    /// Takes a weight (from memory-mapped safetensors) onto the device in [`Self::dtype`].
    fn weight(&self, host: &candle_core::Tensor) -> Result<Self::Tensor, KernelError>;
    /// Takes a weight of `dtype` and `shape` out of mapped files, one piece behind the other, onto the device in [`Self::dtype`].
    fn mapped_weight(
        &self,
        pieces: &[(&MappedFile, Range<usize>)],
        dtype: DType,
        shape: &[usize],
    ) -> Result<Self::Tensor, KernelError> {
        self.weight(&mapped_tensor(pieces, dtype, shape)?)
    }
    /// Takes a weight onto the device in f32 whatever the model's dtype (a router's score bias).
    fn weight_f32(&self, host: &candle_core::Tensor) -> Result<Self::Tensor, KernelError>;
    /// Takes f32 host values onto the device in [`Self::dtype`] (one rounding).
    fn upload(&self, values: &[f32], shape: &[usize]) -> Result<Self::Tensor, KernelError>;
    /// Patches of all `pages` one below the other, `[rows, channels * temporal * area]`, samples normalised, one rounding to
    /// [`Self::dtype`]; a still's only frame is repeated in time.
    fn patches(&self, pages: &[PatchPage<'_>], temporal: usize) -> Result<Self::Tensor, KernelError>;
    /// Copies to the host as f32.
    fn to_host(&self, x: &Self::Tensor) -> Result<Vec<f32>, KernelError>;
    /// Shape.
    fn shape(&self, x: &Self::Tensor) -> Vec<usize>;
    /// The same elements under another shape.
    fn reshape(&self, x: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor, KernelError>;
    /// Rows `rows` of `x [N, H]`, sharing its storage.
    fn row_range(&self, x: &Self::Tensor, rows: Range<usize>) -> Result<Self::Tensor, KernelError>;

    /// Host memory of `bytes` for copies to and from the device.
    ///
    /// # Errors
    /// There is not as much, or it cannot be page-locked.
    fn host_memory(&self, bytes: usize) -> Result<HostMemory, KernelError> {
        Ok(HostMemory::plain(bytes))
    }
    /// Between steps, once the largest one was run: memory for activations that many sizes have cut up becomes one piece.
    fn join_memory(&self) -> Result<(), KernelError> {
        Ok(())
    }
    /// Waits for all work so far: for measurements.
    fn wait(&self) -> Result<(), KernelError> {
        Ok(())
    }
    /// The same elements in memory for what outlives a step, so that a step's own memory is whole again when it ends.
    fn keep(&self, x: &Self::Tensor) -> Result<Self::Tensor, KernelError> {
        Ok(x.clone())
    }
    /// Bytes of `x` as [`Self::read_tensor`] copies it.
    fn tensor_bytes(&self, x: &Self::Tensor) -> usize {
        self.shape(x).iter().product::<usize>() * 4
    }
    /// Copies the elements of `x` to host memory of [`Self::host_memory`] from `offset` on, in the order of the device's work.
    fn read_tensor(&self, x: &Self::Tensor, host: &mut HostMemory, offset: usize) -> Result<(), KernelError> {
        let values = self.to_host(x)?;
        let place = host.part(offset, 4 * values.len())?;
        place.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(bytes, value)| *bytes = value.to_ne_bytes());
        Ok(())
    }
    /// A tensor of `shape` like those of [`Self::keep`] with what [`Self::read_tensor`] gave: equal bits.
    fn write_tensor(&self, shape: &[usize], host: &mut HostMemory, offset: usize) -> Result<Self::Tensor, KernelError> {
        let place = host.part(offset, 4 * shape.iter().product::<usize>())?;
        let values: Vec<f32> = place.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect();
        self.upload(&values, shape)
    }

    /// Takes a list of indices onto the device.
    fn indices(&self, values: Vec<u32>) -> Result<Self::Indices, KernelError>;

    /// The next step's work begins here, on a device whose clock counts: for work that comes before [`Self::step`], which begins
    /// by itself.
    fn begin(&self) -> Result<(), KernelError> {
        Ok(())
    }
    /// Stages `inputs` and runs `forward`, which gives logits `[logit_rows, V]`, or replays a recorded run of it.
    fn step<E: From<KernelError>>(
        &self,
        inputs: StepInputs,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<Self::Logits, E>;
    /// Batch sizes up to `most` that decode steps are recorded for, ascending: running each once before the first request keeps
    /// recording out of the service. None where nothing is recorded.
    fn recorded_batches(&self, most: usize) -> Vec<usize>;
    /// All logits as f32, row by row.
    fn logits_to_host(&self, logits: &Self::Logits) -> Result<Vec<f32>, KernelError>;
    /// Whether this device makes all of `draws` by itself.
    fn draws(&self, draws: &[Draw]) -> bool;
    /// Ends a step: draws a token for each row of its logits, or none if the host draws. Greedy: the largest logit, the lowest
    /// index of equal ones. Waits for nothing; the next step may name the draws in its ids ([`StepInputs::drawn`]).
    fn finish(&self, drawn: Option<(&Self::Logits, &[Draw])>) -> Result<Self::Flight, KernelError>;
    /// Whether [`Self::finished`] would not wait.
    fn has_finished(&self, flight: &Self::Flight) -> Result<bool, KernelError>;
    /// Waits for the end of a step. Steps are asked for in their order.
    fn finished(&self, flight: Self::Flight) -> Result<Finished, KernelError>;

    /// Frequencies (`f32`, see [`crate::angle`]) and the axis (0 temporal, 1 height, 2 width) that each turns with;
    /// positions stay below `positions`.
    fn frequencies(&self, inverse: &[f32], axes: &[u32], positions: usize) -> Result<Self::Frequencies, KernelError>;
    /// cos and sin of every frequency at `positions [T * 3]` -> `[T, frequencies]`, each rounded to f32, then to the dtype.
    fn rope_table(
        &self,
        frequencies: &Self::Frequencies,
        positions: &Self::Indices,
    ) -> Result<RopeTable<Self::Tensor>, KernelError>;

    /// A zeroed pool of `blocks` pages: keys and values `[blocks, block_tokens, kv_heads, head_dim]`.
    fn kv_cache(
        &self,
        blocks: usize,
        block_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self::KvCache, KernelError>;
    /// Bytes of one block in the pools of all layers as [`Self::read_kv_block`] copies it; 0: this backend does not copy blocks.
    fn kv_block_bytes(&self, _caches: &[Self::KvCache]) -> usize {
        0
    }
    /// Copies one block of all layers to host memory of [`Self::host_memory`], [`Self::kv_block_bytes`] bytes from `offset` on, bit
    /// by bit in the pools' own layout, in the order of the device's work.
    fn read_kv_block(
        &self,
        _caches: &[Self::KvCache],
        block: u32,
        _host: &mut HostMemory,
        _offset: usize,
    ) -> Result<(), KernelError> {
        let what = format!("block {block}: this backend does not copy blocks");
        Err(KernelError::Shape { op: "read_kv_block", what })
    }
    /// Copies one block back from what [`Self::read_kv_block`] gave.
    fn write_kv_block(
        &self,
        _caches: &mut [Self::KvCache],
        block: u32,
        _host: &mut HostMemory,
        _offset: usize,
    ) -> Result<(), KernelError> {
        let what = format!("block {block}: this backend does not copy blocks");
        Err(KernelError::Shape { op: "write_kv_block", what })
    }

    /// Rows of `table [V, H]` at `ids` -> [T, H]. Ids out of range are an error.
    fn embed(&self, table: &Self::Tensor, ids: &Self::Indices) -> Result<Self::Tensor, KernelError>;
    /// Rows of `x [N, H]` at `rows` -> [rows, H].
    fn gather_rows(&self, x: &Self::Tensor, rows: &Self::Indices) -> Result<Self::Tensor, KernelError>;
    /// `x` with row `rows[i]` replaced by `values[i]` (vision features into token embeddings).
    fn scatter_rows(
        &self,
        x: &Self::Tensor,
        rows: &Self::Indices,
        values: &Self::Tensor,
    ) -> Result<Self::Tensor, KernelError>;
    /// `x` with `values[i]` added to row `rows[i]`, rounded once (deepstack).
    fn scatter_add_rows(
        &self,
        x: &Self::Tensor,
        rows: &Self::Indices,
        values: &Self::Tensor,
    ) -> Result<Self::Tensor, KernelError>;
    /// Concatenation along rows (dimension 0). Several parts that are neighbours already may be shared; one alone is copied.
    fn concat_rows(&self, parts: &[Self::Tensor]) -> Result<Self::Tensor, KernelError>;

    /// y = round(sum_f32(x W^T) [+ bias]), `x [T, K]`, `w [N, K]`, bias `[N]` added in f32 before the one rounding.
    fn linear(
        &self,
        x: &Self::Tensor,
        w: &Self::Tensor,
        bias: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor, KernelError>;
    /// round(a + b), same shapes.
    fn add(&self, a: &Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor, KernelError>;
    /// RMSNorm over the last dimension: t = round(x rsqrt(mean_f32(x^2) + eps)); y = round(w t).
    fn rms_norm(&self, x: &Self::Tensor, w: &Self::Tensor, eps: f32) -> Result<Self::Tensor, KernelError>;
    /// h = round(residual + x), y = rms_norm(h): returns (h, y).
    fn add_rms_norm(
        &self,
        residual: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Tensor,
        eps: f32,
    ) -> Result<(Self::Tensor, Self::Tensor), KernelError>;
    /// LayerNorm over the last dimension with weight and bias, f32 inside, one rounding.
    fn layer_norm(
        &self,
        x: &Self::Tensor,
        w: &Self::Tensor,
        b: &Self::Tensor,
        eps: f32,
    ) -> Result<Self::Tensor, KernelError>;
    /// h = round(residual + x), y = layer_norm(h): returns (h, y).
    fn add_layer_norm(
        &self,
        residual: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Tensor,
        b: &Self::Tensor,
        eps: f32,
    ) -> Result<(Self::Tensor, Self::Tensor), KernelError>;
    /// `gate_up [T, 2I]` (gate first): round(round(silu_f32(gate)) * up) -> [T, I].
    fn swiglu(&self, gate_up: &Self::Tensor) -> Result<Self::Tensor, KernelError>;
    /// [`Self::swiglu`] of [`Self::linear`] with `gate_up [2I, H]` (gate rows first): `x [T, H]` -> `[T, I]`.
    fn linear_swiglu(&self, x: &Self::Tensor, gate_up: &Self::Tensor) -> Result<Self::Tensor, KernelError> {
        self.swiglu(&self.linear(x, gate_up, None)?)
    }
    /// GELU, f32 inside, one rounding.
    fn gelu(&self, x: &Self::Tensor, kind: GeluKind) -> Result<Self::Tensor, KernelError>;

    /// `qkv [T, (Hq + 2 Hkv) D]` -> per-head RMSNorm of q and k (two roundings as in [`Self::rms_norm`]), half-split RoPE
    /// (three roundings: each product, then the sum), keys and values written to the pages of `batch`, q returned `[T, Hq D]`.
    #[allow(clippy::too_many_arguments)] // One fused launch; a struct would only rename the list.
    fn qkv_norm_rope_cache_write(
        &self,
        qkv: &Self::Tensor,
        q_norm: &Self::Tensor,
        k_norm: &Self::Tensor,
        eps: f32,
        rope: &RopeTable<Self::Tensor>,
        batch: &Self::Batch,
        cache: &mut Self::KvCache,
    ) -> Result<Self::Tensor, KernelError>;

    /// Causal attention of `q [T, Hq D]` over paged keys and values -> `[T, Hq D]`. Query head h reads kv head h / (Hq / Hkv).
    /// f32 scores and accumulation; for bf16 probabilities rounded before PV; output rounded once.
    fn paged_attention(
        &self,
        q: &Self::Tensor,
        batch: &Self::Batch,
        cache: &Self::KvCache,
        scale: f32,
    ) -> Result<Self::Tensor, KernelError>;

    /// What a vision tower's run needs of its patches' places: the rotation's angles in f32 (frequencies `inverse`, each turning
    /// with the row, then with the column; see [`crate::angle`]), and the `segments` of patches that see each other.
    fn geometry(&self, grids: &PatchGrids, inverse: &[f32], segments: Segments) -> Result<Self::Geometry, KernelError>;

    /// Vision attention: `qkv [N, 3 Hq D]` (q, k, v), 2-D RoPE applied in f32 and rounded once, full attention within each
    /// segment -> `[N, Hq D]`.
    fn segment_attention(
        &self,
        qkv: &Self::Tensor,
        heads: usize,
        geometry: &Self::Geometry,
        scale: f32,
    ) -> Result<Self::Tensor, KernelError>;

    /// Position embeddings of the grids of `geometry` -> `[patches, H]`: `table [side * side, H]` stretched over each grid with
    /// corners aligned; row = round(sum of four taps of f32 weight times table row), taps in order.
    fn interpolate_grids(&self, table: &Self::Tensor, geometry: &Self::Geometry) -> Result<Self::Tensor, KernelError>;

    /// Router of Qwen3-MoE: logits = round(x gate^T), p = softmax_f32 over all experts, the `top_k` largest (ties: lowest index),
    /// divided by their sum if `norm_topk`, rounded to the model's dtype. `x [T, H]`, `gate [E, H]`.
    fn router_softmax(
        &self,
        x: &Self::Tensor,
        gate: &Self::Tensor,
        top_k: usize,
        norm_topk: bool,
    ) -> Result<Self::Routing, KernelError>;
    /// Router of GLM-4-MoE, all in f32: s = sigmoid(x gate^T), experts chosen by s + `bias` within the best groups, weights
    /// s / (sum s + 1e-20) (if `norm_topk`) times `scale`, kept in f32. `bias [E]` from [`Self::weight_f32`].
    fn router_sigmoid(
        &self,
        x: &Self::Tensor,
        gate: &Self::Tensor,
        bias: &Self::Tensor,
        choice: SigmoidChoice,
    ) -> Result<Self::Routing, KernelError>;
    /// Experts and weights of each token, `[T, top_k]` row-major, on the host (tests, metrics).
    fn routing_to_host(&self, routing: &Self::Routing) -> Result<(Vec<u32>, Vec<f32>), KernelError>;
    /// Weighted sum of SwiGLU experts: `gate_up [E, 2I, H]` (gate rows first), `down [E, H, I]`, each expert rounding as
    /// [`Self::linear`] and [`Self::swiglu`]. Weights in the model's dtype: products rounded, summed in f32, rounded. Weights in
    /// f32: products and sum in f32, rounded once. Only touched experts are read.
    fn moe_experts(
        &self,
        x: &Self::Tensor,
        gate_up: &Self::Tensor,
        down: &Self::Tensor,
        routing: &Self::Routing,
    ) -> Result<Self::Tensor, KernelError>;

    /// A zeroed pool of latent pages: `latent_dim` normalised latents and `rope_dim` rotated key elements for each token.
    fn mla_cache(
        &self,
        blocks: usize,
        block_tokens: usize,
        latent_dim: usize,
        rope_dim: usize,
    ) -> Result<Self::KvCache, KernelError>;
    /// `kv_a [T, latent + rope]`: RMSNorm of the latents (weight `kv_norm`, `eps`), interleaved-pair RoPE of the last `rope`
    /// elements, both written to the pages. `q [T, heads (nope + rope)]`: the same RoPE on the last `rope` elements of each head;
    /// returned. Rotated elements come out de-interleaved as in Hugging Face, with its three roundings.
    #[allow(clippy::too_many_arguments)] // One fused launch; a struct would only rename the list.
    fn mla_norm_rope_cache_write(
        &self,
        q: &Self::Tensor,
        kv_a: &Self::Tensor,
        kv_norm: &Self::Tensor,
        eps: f32,
        heads: usize,
        rope: &RopeTable<Self::Tensor>,
        batch: &Self::Batch,
        cache: &mut Self::KvCache,
    ) -> Result<Self::Tensor, KernelError>;
    /// Causal latent attention of `q [T, heads (nope + rope)]` with `kv_b [heads (nope + value), latent]` -> `[T, heads value]`.
    /// Sequences with several rows use the expanded form (keys and values rounded, as Hugging Face), those with one row the
    /// absorbed form (query and weighted latent rounded instead); so a chunk of one row rounds differently from a longer one.
    fn mla_attention(
        &self,
        q: &Self::Tensor,
        kv_b: &Self::Tensor,
        heads: usize,
        batch: &Self::Batch,
        cache: &Self::KvCache,
        scale: f32,
    ) -> Result<Self::Tensor, KernelError>;
}
