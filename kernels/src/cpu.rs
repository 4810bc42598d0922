//! The CPU backend: every op of [`Backend`] over candle CPU tensors in f32 or bf16.
//!
//! Owns the choice of element type per op; the ops live in their own files. Results do not depend on how a batch is cut:
//! batched equals single and chunked equals whole, bit by bit.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use half::bf16;

use crate::angles::CpuFrequencies;
use crate::backend::{Backend, GeluKind, RopeTable, Segments, SigmoidChoice};
use crate::error::KernelError;
use crate::grid::{self, PatchGrids};
use crate::host::Host;
use crate::host_memory::HostMemory;
use crate::kv_cache::CpuKvCache;
use crate::patches::PatchPage;
use crate::router::CpuRouting;
use crate::rows::Join;
use crate::simd::Isa;
use crate::step::{Draw, Finished, Forward, Ragged, Staged, StepInputs};
use crate::threads::Threads;
use crate::view::{shape_error, tensor};
use crate::{
    activation, batch, linear, mla, mla_attention, moe, norm, paged_attention, rope, router, rows, segment_attention,
};

/// Calls a generic op for this backend's element type.
macro_rules! typed {
    ($self:ident, $module:ident :: $op:ident ( $($argument:expr),* $(,)? )) => {
        match $self.dtype {
            DType::BF16 => $module::$op::<bf16>($($argument),*),
            _ => $module::$op::<f32>($($argument),*),
        }
    };
}

/// Angles and segments of one run of a vision tower.
#[derive(Debug)]
pub struct CpuGeometry {
    cos: Vec<f32>,
    sin: Vec<f32>,
    segments: Segments,
    grids: PatchGrids,
}

/// The host's processor as a device.
#[derive(Debug)]
pub struct CpuBackend {
    /// F32 or BF16; [`CpuBackend::new`] refuses others.
    dtype: DType,
    host: Host,
    /// Draws of the last step, for ids of the next one.
    drawn: Mutex<Vec<Option<u32>>>,
}

impl CpuBackend {
    /// A backend whose activations and weights are `dtype`: F32 or BF16. Uses every core and the best instruction set.
    pub fn new(dtype: DType) -> Result<Self, KernelError> {
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
        Self::with(dtype, threads, Isa::detect())
    }

    /// As [`Self::new`] with `threads` threads, the caller's included, and the instruction set `isa` (the portable one if the
    /// processor lacks it).
    pub fn with(dtype: DType, threads: usize, isa: Isa) -> Result<Self, KernelError> {
        match dtype {
            DType::F32 | DType::BF16 => {
                Ok(Self { dtype, host: Host { isa, threads: Threads::new(threads) }, drawn: Mutex::default() })
            }
            other => Err(KernelError::Dtype { op: "cpu_backend", dtype: format!("{other:?}") }),
        }
    }
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type KvCache = CpuKvCache;
    type Routing = CpuRouting;
    type Indices = Vec<u32>;
    type Batch = Ragged;
    type Frequencies = CpuFrequencies;
    type Geometry = CpuGeometry;
    type Logits = Tensor;
    type Flight = Vec<Option<u32>>;

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn free_bytes(&self) -> Result<Option<u64>, KernelError> {
        Ok(None)
    }

    fn weight(&self, host: &Tensor) -> Result<Tensor, KernelError> {
        Ok(host.to_device(&Device::Cpu)?.to_dtype(self.dtype)?.contiguous()?)
    }

    fn weight_f32(&self, host: &Tensor) -> Result<Tensor, KernelError> {
        Ok(host.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?)
    }

    fn upload(&self, values: &[f32], shape: &[usize]) -> Result<Tensor, KernelError> {
        if values.len() != shape.iter().product::<usize>() {
            return Err(shape_error("upload", format!("{} values for shape {shape:?}", values.len())));
        }
        match self.dtype {
            DType::BF16 => tensor::<bf16>(values.iter().map(|&v| crate::element::Element::narrow(v)).collect(), shape),
            _ => tensor(values.to_vec(), shape),
        }
    }

    fn patches(&self, pages: &[PatchPage<'_>], temporal: usize) -> Result<Tensor, KernelError> {
        let Some(first) = pages.first() else { return Err(shape_error("patches", "no pages")) };
        let mut values = Vec::new();
        for page in pages {
            page.check(temporal)?;
            values.extend(page.floats(temporal)?);
        }
        let rows = pages.iter().map(|page| page.rows).sum();
        self.upload(&values, &[rows, first.channels * temporal * first.area])
    }

    fn to_host(&self, x: &Tensor) -> Result<Vec<f32>, KernelError> {
        Ok(x.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    fn shape(&self, x: &Tensor) -> Vec<usize> {
        x.dims().to_vec()
    }

    fn reshape(&self, x: &Tensor, shape: &[usize]) -> Result<Tensor, KernelError> {
        if x.elem_count() != shape.iter().product::<usize>() {
            return Err(shape_error("reshape", format!("{:?} to {shape:?}", x.dims())));
        }
        Ok(x.reshape(shape)?)
    }

    fn row_range(&self, x: &Tensor, rows: Range<usize>) -> Result<Tensor, KernelError> {
        match *x.dims() {
            [count, _] if rows.start <= rows.end && rows.end <= count => Ok(x.narrow(0, rows.start, rows.len())?),
            _ => Err(shape_error("row_range", format!("rows {rows:?} of {:?}", x.dims()))),
        }
    }

    fn indices(&self, values: Vec<u32>) -> Result<Vec<u32>, KernelError> {
        Ok(values)
    }

    fn step<E: From<KernelError>>(
        &self,
        mut inputs: StepInputs,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<Tensor, E> {
        {
            let drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
            inputs.check_drawn(drawn.len())?;
            for id in inputs.ids.iter_mut().filter(|id| **id & StepInputs::DRAWN != 0) {
                *id = drawn.get((*id & !StepInputs::DRAWN) as usize).copied().flatten().unwrap_or(0);
            }
        }
        let tail = inputs.tail().map(|tail| batch::part(&inputs.ragged, &tail));
        let StepInputs { ids, positions, ragged, block_tokens: _, logit_rows, replayable: _ } = inputs;
        forward(&Staged { ids, positions: positions.into_flattened(), batch: ragged, logit_rows, tail })
    }

    fn recorded_batches(&self, _most: usize) -> Vec<usize> {
        Vec::new()
    }

    fn logits_to_host(&self, logits: &Tensor) -> Result<Vec<f32>, KernelError> {
        self.to_host(logits)
    }

    fn draws(&self, draws: &[Draw]) -> bool {
        draws.iter().all(|draw| draw.temperature <= 0.0)
    }

    fn finish(&self, drawn: Option<(&Tensor, &[Draw])>) -> Result<Vec<Option<u32>>, KernelError> {
        let winners = match drawn {
            Some((logits, draws)) if self.draws(draws) => typed!(self, rows::winners(logits))?,
            Some(_) => return Err(shape_error("finish", "random draws, which are the host's")),
            None => Vec::new(),
        };
        self.drawn.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&winners);
        Ok(winners)
    }

    fn has_finished(&self, _flight: &Vec<Option<u32>>) -> Result<bool, KernelError> {
        Ok(true)
    }

    fn finished(&self, flight: Vec<Option<u32>>) -> Result<Finished, KernelError> {
        Ok(Finished { drawn: flight, times: None })
    }

    fn frequencies(&self, inverse: &[f32], axes: &[u32], _positions: usize) -> Result<CpuFrequencies, KernelError> {
        CpuFrequencies::new(inverse, axes)
    }

    fn rope_table(&self, frequencies: &CpuFrequencies, positions: &Vec<u32>) -> Result<RopeTable<Tensor>, KernelError> {
        let (cos, sin) = frequencies.angles(positions)?;
        let shape = [positions.len() / 3, frequencies.len()];
        Ok(RopeTable { cos: self.upload(&cos, &shape)?, sin: self.upload(&sin, &shape)? })
    }

    fn kv_cache(
        &self,
        blocks: usize,
        block_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<CpuKvCache, KernelError> {
        typed!(self, CpuKvCache::new("kv_cache", blocks, block_tokens, kv_heads, head_dim))
    }

    fn kv_block_bytes(&self, caches: &[CpuKvCache]) -> usize {
        caches.iter().map(CpuKvCache::block_bytes).sum()
    }

    fn read_kv_block(
        &self,
        caches: &[CpuKvCache],
        block: u32,
        host: &mut HostMemory,
        mut offset: usize,
    ) -> Result<(), KernelError> {
        for cache in caches {
            cache.read_block(block as usize, host.part(offset, cache.block_bytes())?)?;
            offset += cache.block_bytes();
        }
        Ok(())
    }

    fn write_kv_block(
        &self,
        caches: &mut [CpuKvCache],
        block: u32,
        host: &mut HostMemory,
        mut offset: usize,
    ) -> Result<(), KernelError> {
        for cache in caches {
            let bytes = cache.block_bytes();
            cache.write_block(block as usize, host.part(offset, bytes)?)?;
            offset += bytes;
        }
        Ok(())
    }

    fn embed(&self, table: &Tensor, ids: &Vec<u32>) -> Result<Tensor, KernelError> {
        typed!(self, rows::gather("embed", table, ids))
    }

    fn gather_rows(&self, x: &Tensor, rows: &Vec<u32>) -> Result<Tensor, KernelError> {
        typed!(self, rows::gather("gather_rows", x, rows))
    }

    fn scatter_rows(&self, x: &Tensor, rows: &Vec<u32>, values: &Tensor) -> Result<Tensor, KernelError> {
        typed!(self, rows::scatter("scatter_rows", x, rows, values, Join::Replace))
    }

    fn scatter_add_rows(&self, x: &Tensor, rows: &Vec<u32>, values: &Tensor) -> Result<Tensor, KernelError> {
        typed!(self, rows::scatter("scatter_add_rows", x, rows, values, Join::Add))
    }

    fn concat_rows(&self, parts: &[Tensor]) -> Result<Tensor, KernelError> {
        typed!(self, rows::concat(parts))
    }

    fn linear(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, KernelError> {
        typed!(self, linear::linear(&self.host, x, w, bias))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, KernelError> {
        typed!(self, norm::add(&self.host, a, b))
    }

    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor, KernelError> {
        typed!(self, norm::rms_norm(&self.host, x, w, eps))
    }

    fn add_rms_norm(
        &self,
        residual: &Tensor,
        x: &Tensor,
        w: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor), KernelError> {
        typed!(self, norm::add_rms_norm(&self.host, residual, x, w, eps))
    }

    fn layer_norm(&self, x: &Tensor, w: &Tensor, b: &Tensor, eps: f32) -> Result<Tensor, KernelError> {
        typed!(self, norm::layer_norm(&self.host, x, w, b, eps))
    }

    fn add_layer_norm(
        &self,
        residual: &Tensor,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor), KernelError> {
        typed!(self, norm::add_layer_norm(&self.host, residual, x, w, b, eps))
    }

    fn swiglu(&self, gate_up: &Tensor) -> Result<Tensor, KernelError> {
        typed!(self, activation::swiglu(&self.host, gate_up))
    }

    fn gelu(&self, x: &Tensor, kind: GeluKind) -> Result<Tensor, KernelError> {
        typed!(self, activation::gelu(&self.host, x, kind))
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
    ) -> Result<Tensor, KernelError> {
        typed!(self, rope::qkv_norm_rope_cache_write(&self.host, qkv, [q_norm, k_norm], eps, rope, batch, cache))
    }

    fn paged_attention(
        &self,
        q: &Tensor,
        batch: &Ragged,
        cache: &CpuKvCache,
        scale: f32,
    ) -> Result<Tensor, KernelError> {
        typed!(self, paged_attention::paged_attention(&self.host, q, batch, cache, scale))
    }

    fn geometry(&self, grids: &PatchGrids, inverse: &[f32], segments: Segments) -> Result<CpuGeometry, KernelError> {
        let patches = grids.starts("geometry")?.last().copied();
        let start = &segments.start;
        let spans = start.first() == Some(&0) && start.windows(2).all(|pair| pair[0] <= pair[1]);
        if !spans || start.last().copied() != patches {
            return Err(shape_error("geometry", format!("segment starts {start:?} for {patches:?} patches")));
        }
        let (cos, sin) = grid::rotation(grids, inverse);
        Ok(CpuGeometry { cos, sin, segments, grids: grids.clone() })
    }

    fn segment_attention(
        &self,
        qkv: &Tensor,
        heads: usize,
        geometry: &CpuGeometry,
        scale: f32,
    ) -> Result<Tensor, KernelError> {
        let CpuGeometry { cos, sin, segments, .. } = geometry;
        typed!(self, segment_attention::segment_attention(&self.host, qkv, heads, [cos, sin], segments, scale))
    }

    fn interpolate_grids(&self, table: &Tensor, geometry: &CpuGeometry) -> Result<Tensor, KernelError> {
        typed!(self, grid::interpolate(&self.host, table, &geometry.grids))
    }

    fn router_softmax(
        &self,
        x: &Tensor,
        gate: &Tensor,
        top_k: usize,
        norm_topk: bool,
    ) -> Result<CpuRouting, KernelError> {
        typed!(self, router::softmax(&self.host, x, gate, top_k, norm_topk))
    }

    fn router_sigmoid(
        &self,
        x: &Tensor,
        gate: &Tensor,
        bias: &Tensor,
        choice: SigmoidChoice,
    ) -> Result<CpuRouting, KernelError> {
        typed!(self, router::sigmoid(&self.host, x, gate, bias, choice))
    }

    fn routing_to_host(&self, routing: &CpuRouting) -> Result<(Vec<u32>, Vec<f32>), KernelError> {
        Ok((routing.experts.clone(), routing.weights.clone()))
    }

    fn moe_experts(
        &self,
        x: &Tensor,
        gate_up: &Tensor,
        down: &Tensor,
        routing: &CpuRouting,
    ) -> Result<Tensor, KernelError> {
        typed!(self, moe::experts(&self.host, x, gate_up, down, routing))
    }

    fn mla_cache(
        &self,
        blocks: usize,
        block_tokens: usize,
        latent_dim: usize,
        rope_dim: usize,
    ) -> Result<CpuKvCache, KernelError> {
        typed!(self, CpuKvCache::of_latents("mla_cache", blocks, block_tokens, latent_dim, rope_dim))
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
    ) -> Result<Tensor, KernelError> {
        typed!(self, mla::norm_rope_cache_write(&self.host, [q, kv_a, kv_norm], eps, heads, rope, batch, cache))
    }

    fn mla_attention(
        &self,
        q: &Tensor,
        kv_b: &Tensor,
        heads: usize,
        batch: &Ragged,
        cache: &CpuKvCache,
        scale: f32,
    ) -> Result<Tensor, KernelError> {
        typed!(self, mla_attention::mla_attention(&self.host, q, kv_b, heads, batch, cache, scale))
    }
}
