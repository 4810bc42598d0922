//! The CPU backend with a notebook: every op is passed on, and its name is noted with what an item of the floor wants to know of it.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor, TensorId};
use millrace_kernels::{Backend, CpuBackend, CpuKvCache, CpuRouting, Draw, Forward, PatchPage, Staged, StepInputs};
use millrace_kernels::{GeluKind, KernelError, PatchGrids, Ragged, RopeTable, Segments, SigmoidChoice};

/// One call.
#[derive(Debug, Clone)]
pub enum Call {
    /// Any op without a note of its own.
    Op(&'static str),
    /// A projection: rows of its result.
    Linear { outputs: usize },
    /// A pool was made.
    Pool { blocks: usize, block_tokens: usize, bytes: usize },
    /// Keys or latents were written: the angles used.
    Write { op: &'static str, rope: TensorId, cos: Vec<f32> },
    /// Attention over pages.
    Attention { op: &'static str, batch: Ragged },
}

impl Call {
    /// The op's name in `Backend`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Op(name) | Self::Write { op: name, .. } | Self::Attention { op: name, .. } => name,
            Self::Linear { .. } => "linear",
            Self::Pool { .. } => "pool",
        }
    }
}

/// What was called, in order; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Notebook(Arc<Mutex<Vec<Call>>>);

impl Notebook {
    fn note(&self, call: Call) {
        self.0.lock().unwrap().push(call);
    }

    /// All calls since the last time.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// How often `name` was called.
pub fn count(calls: &[Call], name: &str) -> usize {
    calls.iter().filter(|call| call.name() == name).count()
}

/// The attention calls' batches.
pub fn attention(calls: &[Call]) -> Vec<&Ragged> {
    calls.iter().filter_map(|call| if let Call::Attention { batch, .. } = call { Some(batch) } else { None }).collect()
}

/// The backend.
pub struct Recorder {
    inner: CpuBackend,
    notebook: Notebook,
}

impl Recorder {
    /// Computes in `dtype` and writes into `notebook`.
    pub fn new(dtype: DType, notebook: Notebook) -> Self {
        Self { inner: CpuBackend::new(dtype).unwrap(), notebook }
    }
}

type Done<T> = Result<T, KernelError>;
type Indices = <CpuBackend as Backend>::Indices;
type Frequencies = <CpuBackend as Backend>::Frequencies;
type Geometry = <CpuBackend as Backend>::Geometry;
type Logits = <CpuBackend as Backend>::Logits;

/// Ops that are noted by name and passed on.
macro_rules! by_name {
    ($(fn $op:ident(&self $(, $argument:ident: $kind:ty)* $(,)?) -> $out:ty;)*) => {
        $(fn $op(&self $(, $argument: $kind)*) -> $out {
            self.notebook.note(Call::Op(stringify!($op)));
            self.inner.$op($($argument),*)
        })*
    };
}

impl Backend for Recorder {
    type Tensor = Tensor;
    type KvCache = CpuKvCache;
    type Routing = CpuRouting;
    type Indices = Indices;
    type Batch = <CpuBackend as Backend>::Batch;
    type Frequencies = Frequencies;
    type Geometry = Geometry;
    type Logits = Logits;

    by_name! {
        fn dtype(&self) -> DType;
        fn weight(&self, host: &Tensor) -> Done<Tensor>;
        fn weight_f32(&self, host: &Tensor) -> Done<Tensor>;
        fn upload(&self, values: &[f32], shape: &[usize]) -> Done<Tensor>;
        fn to_host(&self, x: &Tensor) -> Done<Vec<f32>>;
        fn shape(&self, x: &Tensor) -> Vec<usize>;
        fn reshape(&self, x: &Tensor, shape: &[usize]) -> Done<Tensor>;
        fn embed(&self, table: &Tensor, ids: &Indices) -> Done<Tensor>;
        fn gather_rows(&self, x: &Tensor, rows: &Indices) -> Done<Tensor>;
        fn scatter_rows(&self, x: &Tensor, rows: &Indices, values: &Tensor) -> Done<Tensor>;
        fn scatter_add_rows(&self, x: &Tensor, rows: &Indices, values: &Tensor) -> Done<Tensor>;
        fn concat_rows(&self, parts: &[Tensor]) -> Done<Tensor>;
        fn add(&self, a: &Tensor, b: &Tensor) -> Done<Tensor>;
        fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Done<Tensor>;
        fn add_rms_norm(&self, residual: &Tensor, x: &Tensor, w: &Tensor, eps: f32) -> Done<(Tensor, Tensor)>;
        fn layer_norm(&self, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Done<Tensor>;
        fn add_layer_norm(&self, residual: &Tensor, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Done<(Tensor, Tensor)>;
        fn swiglu(&self, gate_up: &Tensor) -> Done<Tensor>;
        fn gelu(&self, x: &Tensor, kind: GeluKind) -> Done<Tensor>;
        fn row_range(&self, x: &Tensor, rows: Range<usize>) -> Done<Tensor>;
        fn indices(&self, values: Vec<u32>) -> Done<Indices>;
        fn recorded_batches(&self, most: usize) -> Vec<usize>;
        fn logits_to_host(&self, logits: &Logits) -> Done<Vec<f32>>;
        fn draw(&self, logits: &Logits, draws: &[Draw]) -> Done<Option<Vec<Option<u32>>>>;
        fn frequencies(&self, inverse: &[f32], axes: &[u32], positions: usize) -> Done<Frequencies>;
        fn free_bytes(&self) -> Done<Option<u64>>;
        fn patches(&self, pages: &[PatchPage<'_>], temporal: usize) -> Done<Tensor>;
        fn rope_table(&self, frequencies: &Frequencies, positions: &Indices) -> Done<RopeTable<Tensor>>;
        fn geometry(&self, grids: &PatchGrids, inverse: &[f32], segments: Segments) -> Done<Geometry>;
        fn segment_attention(&self, qkv: &Tensor, heads: usize, geometry: &Geometry, scale: f32) -> Done<Tensor>;
        fn interpolate_grids(&self, table: &Tensor, geometry: &Geometry) -> Done<Tensor>;
        fn router_softmax(&self, x: &Tensor, gate: &Tensor, top_k: usize, norm_topk: bool) -> Done<CpuRouting>;
        fn router_sigmoid(&self, x: &Tensor, gate: &Tensor, bias: &Tensor, choice: SigmoidChoice) -> Done<CpuRouting>;
        fn routing_to_host(&self, routing: &CpuRouting) -> Done<(Vec<u32>, Vec<f32>)>;
        fn moe_experts(&self, x: &Tensor, gate_up: &Tensor, down: &Tensor, routing: &CpuRouting) -> Done<Tensor>;
    }

    fn step<E: From<KernelError>>(&self, inputs: StepInputs, forward: &mut Forward<'_, Self, E>) -> Result<Logits, E> {
        self.inner.step(inputs, &mut |staged: &Staged<CpuBackend>| {
            let Staged { ids, positions, batch, logit_rows, tail } = staged;
            let (ids, positions, batch) = (ids.clone(), positions.clone(), batch.clone());
            forward(&Staged { ids, positions, batch, logit_rows: logit_rows.clone(), tail: tail.clone() })
        })
    }

    fn linear(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Done<Tensor> {
        self.notebook.note(Call::Linear { outputs: w.dims()[0] });
        self.inner.linear(x, w, bias)
    }

    fn kv_cache(&self, blocks: usize, block_tokens: usize, kv_heads: usize, head_dim: usize) -> Done<CpuKvCache> {
        let pool = self.inner.kv_cache(blocks, block_tokens, kv_heads, head_dim)?;
        self.notebook.note(Call::Pool { blocks, block_tokens, bytes: pool.bytes() });
        Ok(pool)
    }

    fn mla_cache(&self, blocks: usize, block_tokens: usize, latent_dim: usize, rope_dim: usize) -> Done<CpuKvCache> {
        let pool = self.inner.mla_cache(blocks, block_tokens, latent_dim, rope_dim)?;
        self.notebook.note(Call::Pool { blocks, block_tokens, bytes: pool.bytes() });
        Ok(pool)
    }

    fn qkv_norm_rope_cache_write(
        &self,
        qkv: &Tensor,
        q_norm: &Tensor,
        k_norm: &Tensor,
        eps: f32,
        rope: &RopeTable<Tensor>,
        batch: &Ragged,
        cache: &mut CpuKvCache,
    ) -> Done<Tensor> {
        let cos = self.inner.to_host(&rope.cos)?;
        self.notebook.note(Call::Write { op: "qkv_norm_rope_cache_write", rope: rope.cos.id(), cos });
        self.inner.qkv_norm_rope_cache_write(qkv, q_norm, k_norm, eps, rope, batch, cache)
    }

    fn paged_attention(&self, q: &Tensor, batch: &Ragged, cache: &CpuKvCache, scale: f32) -> Done<Tensor> {
        self.notebook.note(Call::Attention { op: "paged_attention", batch: batch.clone() });
        self.inner.paged_attention(q, batch, cache, scale)
    }

    fn mla_norm_rope_cache_write(
        &self,
        q: &Tensor,
        kv_a: &Tensor,
        kv_norm: &Tensor,
        eps: f32,
        heads: usize,
        rope: &RopeTable<Tensor>,
        batch: &Ragged,
        cache: &mut CpuKvCache,
    ) -> Done<Tensor> {
        let cos = self.inner.to_host(&rope.cos)?;
        self.notebook.note(Call::Write { op: "mla_norm_rope_cache_write", rope: rope.cos.id(), cos });
        self.inner.mla_norm_rope_cache_write(q, kv_a, kv_norm, eps, heads, rope, batch, cache)
    }

    fn mla_attention(
        &self,
        q: &Tensor,
        kv_b: &Tensor,
        heads: usize,
        batch: &Ragged,
        cache: &CpuKvCache,
        scale: f32,
    ) -> Done<Tensor> {
        self.notebook.note(Call::Attention { op: "mla_attention", batch: batch.clone() });
        self.inner.mla_attention(q, kv_b, heads, batch, cache, scale)
    }
}
