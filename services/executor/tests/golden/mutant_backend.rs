//! A backend with one op wrong on purpose; all others are the real ones.

use std::ops::Range;

use millrace_kernels::{
    Backend, Draw, Forward, GeluKind, KernelError, PatchGrids, PatchPage, RopeTable, Segments, SigmoidChoice, Staged,
    StepInputs,
};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    None,
    /// erf where the tower's blocks take tanh.
    GeluOfBlocks,
    /// tanh where its mergers take erf.
    GeluOfMergers,
    NoPositionEmbeddings,
    PositionEmbeddingsShifted,
    NoQkNorm,
    NoVisionRotation,
    SegmentsJoined,
    NoTopkNorm,
    NoRouterBias,
    NoLatentNorm,
    /// No fault: weights take no memory, and nothing can be computed.
    Weightless,
}

pub struct MutantBackend<B> {
    inner: B,
    fault: Fault,
}

impl<B> MutantBackend<B> {
    pub fn new(inner: B, fault: Fault) -> Self {
        Self { inner, fault }
    }
}

type Done<T> = Result<T, KernelError>;

impl<B: Backend> Backend for MutantBackend<B> {
    type Tensor = B::Tensor;
    type KvCache = B::KvCache;
    type Routing = B::Routing;
    type Indices = B::Indices;
    type Batch = B::Batch;
    type Frequencies = B::Frequencies;
    type Geometry = B::Geometry;
    type Logits = B::Logits;

    fn gelu(&self, x: &B::Tensor, kind: GeluKind) -> Done<B::Tensor> {
        let kind = match (self.fault, kind) {
            (Fault::GeluOfBlocks, GeluKind::Tanh) => GeluKind::Erf,
            (Fault::GeluOfMergers, GeluKind::Erf) => GeluKind::Tanh,
            _ => kind,
        };
        self.inner.gelu(x, kind)
    }

    fn interpolate_grids(&self, table: &B::Tensor, geometry: &B::Geometry) -> Done<B::Tensor> {
        let shape = self.inner.shape(table);
        let nothing = self.inner.upload(&vec![0.0; shape.iter().product()], &shape)?;
        let table = if self.fault == Fault::NoPositionEmbeddings { &nothing } else { table };
        let right = self.inner.interpolate_grids(table, geometry)?;
        if self.fault != Fault::PositionEmbeddingsShifted {
            return Ok(right);
        }
        let patches = self.inner.shape(&right)[0] as u32;
        self.inner.gather_rows(&right, &self.inner.indices((0..patches).map(|patch| (patch + 1) % patches).collect())?)
    }

    fn qkv_norm_rope_cache_write(
        &self,
        qkv: &B::Tensor,
        q_norm: &B::Tensor,
        k_norm: &B::Tensor,
        eps: f32,
        rope: &RopeTable<B::Tensor>,
        batch: &B::Batch,
        cache: &mut B::KvCache,
    ) -> Done<B::Tensor> {
        let shape = self.inner.shape(q_norm);
        let ones = self.inner.upload(&vec![1.0; shape[0]], &shape)?;
        let (q, k) = if self.fault == Fault::NoQkNorm { (&ones, &ones) } else { (q_norm, k_norm) };
        self.inner.qkv_norm_rope_cache_write(qkv, q, k, eps, rope, batch, cache)
    }

    fn geometry(&self, grids: &PatchGrids, inverse: &[f32], mut segments: Segments) -> Done<B::Geometry> {
        if self.fault == Fault::SegmentsJoined {
            segments.start = vec![0, *segments.start.last().unwrap()];
        }
        let still = vec![0.0; inverse.len()];
        self.inner.geometry(grids, if self.fault == Fault::NoVisionRotation { &still } else { inverse }, segments)
    }

    fn step<E: From<KernelError>>(
        &self,
        inputs: StepInputs,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<B::Logits, E> {
        self.inner.step(inputs, &mut |staged: &Staged<B>| {
            let Staged { ids, positions, batch, logit_rows, tail } = staged;
            let (ids, positions, batch) = (ids.clone(), positions.clone(), batch.clone());
            forward(&Staged { ids, positions, batch, logit_rows: logit_rows.clone(), tail: tail.clone() })
        })
    }

    fn dtype(&self) -> candle_core::DType {
        self.inner.dtype()
    }
    fn free_bytes(&self) -> Done<Option<u64>> {
        self.inner.free_bytes()
    }
    fn weight(&self, host: &candle_core::Tensor) -> Done<B::Tensor> {
        if self.fault == Fault::Weightless { self.inner.upload(&[0.0], &[1]) } else { self.inner.weight(host) }
    }
    fn upload(&self, values: &[f32], shape: &[usize]) -> Done<B::Tensor> {
        self.inner.upload(values, shape)
    }
    fn patches(&self, pages: &[PatchPage<'_>], temporal: usize) -> Done<B::Tensor> {
        self.inner.patches(pages, temporal)
    }
    fn to_host(&self, x: &B::Tensor) -> Done<Vec<f32>> {
        self.inner.to_host(x)
    }
    fn shape(&self, x: &B::Tensor) -> Vec<usize> {
        self.inner.shape(x)
    }
    fn reshape(&self, x: &B::Tensor, shape: &[usize]) -> Done<B::Tensor> {
        self.inner.reshape(x, shape)
    }
    fn kv_cache(&self, blocks: usize, block_tokens: usize, kv_heads: usize, head_dim: usize) -> Done<B::KvCache> {
        self.inner.kv_cache(blocks, block_tokens, kv_heads, head_dim)
    }
    fn segment_attention(&self, qkv: &B::Tensor, heads: usize, geometry: &B::Geometry, scale: f32) -> Done<B::Tensor> {
        self.inner.segment_attention(qkv, heads, geometry, scale)
    }
    fn row_range(&self, x: &B::Tensor, rows: Range<usize>) -> Done<B::Tensor> {
        self.inner.row_range(x, rows)
    }
    fn indices(&self, values: Vec<u32>) -> Done<B::Indices> {
        self.inner.indices(values)
    }
    fn recorded_batches(&self, most: usize) -> Vec<usize> {
        self.inner.recorded_batches(most)
    }
    fn logits_to_host(&self, logits: &B::Logits) -> Done<Vec<f32>> {
        self.inner.logits_to_host(logits)
    }
    fn draw(&self, logits: &B::Logits, draws: &[Draw]) -> Done<Option<Vec<Option<u32>>>> {
        self.inner.draw(logits, draws)
    }
    fn frequencies(&self, inverse: &[f32], axes: &[u32], positions: usize) -> Done<B::Frequencies> {
        self.inner.frequencies(inverse, axes, positions)
    }
    fn rope_table(&self, frequencies: &B::Frequencies, positions: &B::Indices) -> Done<RopeTable<B::Tensor>> {
        self.inner.rope_table(frequencies, positions)
    }
    fn embed(&self, table: &B::Tensor, ids: &B::Indices) -> Done<B::Tensor> {
        self.inner.embed(table, ids)
    }
    fn gather_rows(&self, x: &B::Tensor, rows: &B::Indices) -> Done<B::Tensor> {
        self.inner.gather_rows(x, rows)
    }
    fn scatter_rows(&self, x: &B::Tensor, rows: &B::Indices, values: &B::Tensor) -> Done<B::Tensor> {
        self.inner.scatter_rows(x, rows, values)
    }
    fn scatter_add_rows(&self, x: &B::Tensor, rows: &B::Indices, values: &B::Tensor) -> Done<B::Tensor> {
        self.inner.scatter_add_rows(x, rows, values)
    }
    fn concat_rows(&self, parts: &[B::Tensor]) -> Done<B::Tensor> {
        self.inner.concat_rows(parts)
    }
    fn linear(&self, x: &B::Tensor, w: &B::Tensor, bias: Option<&B::Tensor>) -> Done<B::Tensor> {
        self.inner.linear(x, w, bias)
    }
    fn add(&self, a: &B::Tensor, b: &B::Tensor) -> Done<B::Tensor> {
        self.inner.add(a, b)
    }
    fn rms_norm(&self, x: &B::Tensor, w: &B::Tensor, eps: f32) -> Done<B::Tensor> {
        self.inner.rms_norm(x, w, eps)
    }
    fn add_rms_norm(
        &self,
        residual: &B::Tensor,
        x: &B::Tensor,
        w: &B::Tensor,
        eps: f32,
    ) -> Done<(B::Tensor, B::Tensor)> {
        self.inner.add_rms_norm(residual, x, w, eps)
    }
    fn layer_norm(&self, x: &B::Tensor, w: &B::Tensor, b: &B::Tensor, eps: f32) -> Done<B::Tensor> {
        self.inner.layer_norm(x, w, b, eps)
    }
    fn add_layer_norm(
        &self,
        residual: &B::Tensor,
        x: &B::Tensor,
        w: &B::Tensor,
        b: &B::Tensor,
        eps: f32,
    ) -> Done<(B::Tensor, B::Tensor)> {
        self.inner.add_layer_norm(residual, x, w, b, eps)
    }
    fn swiglu(&self, gate_up: &B::Tensor) -> Done<B::Tensor> {
        self.inner.swiglu(gate_up)
    }
    fn paged_attention(&self, q: &B::Tensor, batch: &B::Batch, cache: &B::KvCache, scale: f32) -> Done<B::Tensor> {
        self.inner.paged_attention(q, batch, cache, scale)
    }
    fn weight_f32(&self, host: &candle_core::Tensor) -> Done<B::Tensor> {
        if self.fault == Fault::Weightless { self.inner.upload(&[0.0], &[1]) } else { self.inner.weight_f32(host) }
    }

    fn router_softmax(&self, x: &B::Tensor, gate: &B::Tensor, top_k: usize, norm_topk: bool) -> Done<B::Routing> {
        self.inner.router_softmax(x, gate, top_k, norm_topk && self.fault != Fault::NoTopkNorm)
    }

    fn router_sigmoid(
        &self,
        x: &B::Tensor,
        gate: &B::Tensor,
        bias: &B::Tensor,
        mut choice: SigmoidChoice,
    ) -> Done<B::Routing> {
        choice.norm_topk &= self.fault != Fault::NoTopkNorm;
        let experts = self.inner.shape(bias)[0];
        let zeros = candle_core::Tensor::zeros(experts, candle_core::DType::F32, &candle_core::Device::Cpu)?;
        let none = self.inner.weight_f32(&zeros)?;
        let bias = if self.fault == Fault::NoRouterBias { &none } else { bias };
        self.inner.router_sigmoid(x, gate, bias, choice)
    }

    fn mla_norm_rope_cache_write(
        &self,
        q: &B::Tensor,
        kv_a: &B::Tensor,
        kv_norm: &B::Tensor,
        eps: f32,
        heads: usize,
        rope: &RopeTable<B::Tensor>,
        batch: &B::Batch,
        cache: &mut B::KvCache,
    ) -> Done<B::Tensor> {
        let shape = self.inner.shape(kv_norm);
        let ones = self.inner.upload(&vec![1.0; shape[0]], &shape)?;
        let norm = if self.fault == Fault::NoLatentNorm { &ones } else { kv_norm };
        self.inner.mla_norm_rope_cache_write(q, kv_a, norm, eps, heads, rope, batch, cache)
    }

    fn routing_to_host(&self, routing: &B::Routing) -> Done<(Vec<u32>, Vec<f32>)> {
        self.inner.routing_to_host(routing)
    }
    fn moe_experts(
        &self,
        x: &B::Tensor,
        gate_up: &B::Tensor,
        down: &B::Tensor,
        routing: &B::Routing,
    ) -> Done<B::Tensor> {
        self.inner.moe_experts(x, gate_up, down, routing)
    }
    fn mla_cache(&self, blocks: usize, block_tokens: usize, latent_dim: usize, rope_dim: usize) -> Done<B::KvCache> {
        self.inner.mla_cache(blocks, block_tokens, latent_dim, rope_dim)
    }
    fn mla_attention(
        &self,
        q: &B::Tensor,
        kv_b: &B::Tensor,
        heads: usize,
        batch: &B::Batch,
        cache: &B::KvCache,
        scale: f32,
    ) -> Done<B::Tensor> {
        self.inner.mla_attention(q, kv_b, heads, batch, cache, scale)
    }
}
