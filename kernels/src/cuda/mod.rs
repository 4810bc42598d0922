//! The CUDA backend: our kernels and cuBLASLt on one device and one stream, in bf16.
//!
//! Owns the device and its memory. Ops are launched and not waited for; only copies to the host wait. `unsafe` stands in
//! `driver`, `memory`, `pinned`, `flight`, `linear` and `step`, and in the copies here.

mod ahead;
mod attention;
mod driver;
mod flight;
mod gated_linear;
mod grid;
mod host_copies;
mod linear;
mod memory;
mod norm;
mod open;
mod patches;
mod pinned;
mod ring;
mod rope;
mod rows;
mod skinny;
mod staging;
mod step;
mod tensor;
mod tiles;
mod upload;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::DType;
use half::bf16;

pub use flight::CudaFlight;
pub(crate) use pinned::Pinned;
pub use step::CudaLogits;
pub use tensor::{CudaBatch, CudaFrequencies, CudaGeometry, CudaIndices, CudaKvCache, CudaTensor};

use crate::backend::{Backend, GeluKind, RopeTable, Segments, SigmoidChoice};
use crate::device_memory::{MemoryKind, MemoryReader};
use crate::error::KernelError;
use crate::grid::PatchGrids;
use crate::host_memory::HostMemory;
use crate::mapped::{MappedFile, mapped_tensor};
use crate::patches::PatchPage;
use crate::step::{Draw, Finished, Forward, StepInputs};
use crate::view::shape_error;
use attention::DecodeScratch;
use driver::Driver;
use flight::Flights;
use host_copies::Way;
use linear::Linear;
use memory::Memory;
use patches::Waiting;
use step::Steps;
use tensor::ELEMENT;
use upload::Upload;

/// One CUDA device.
///
/// Fields drop in order: what holds memory or work goes before the driver, which everyone shares.
#[derive(Debug)]
pub struct CudaBackend {
    steps: Steps,
    flights: Flights,
    upload: Upload,
    waiting: Mutex<Waiting>,
    linear: Linear,
    decode: DecodeScratch,
    memory: Arc<Memory>,
    driver: Arc<Driver>,
    graphs: bool,
}

fn unsupported<T>(op: &'static str) -> Result<T, KernelError> {
    Err(KernelError::Unsupported { op, what: "mixtures of experts and latent attention run on the CPU only".into() })
}

impl Backend for CudaBackend {
    type Tensor = CudaTensor;
    type KvCache = CudaKvCache;
    type Routing = ();
    type Indices = CudaIndices;
    type Batch = CudaBatch;
    type Frequencies = CudaFrequencies;
    type Geometry = CudaGeometry;
    type Logits = CudaLogits;
    type Flight = CudaFlight;

    fn dtype(&self) -> DType {
        DType::BF16
    }

    fn free_bytes(&self) -> Result<Option<u64>, KernelError> {
        Ok(Some(self.driver.memory()?.0 as u64))
    }

    fn memory_reader(&self) -> Option<MemoryReader> {
        // Whoever reads metrics does not keep the memory.
        let memory = Arc::downgrade(&self.memory);
        let closed = || KernelError::NoDevice("it was closed".into());
        Some(Arc::new(move || memory.upgrade().ok_or_else(closed)?.read()))
    }

    fn weight(&self, host: &candle_core::Tensor) -> Result<CudaTensor, KernelError> {
        self.take_weight(host)
    }

    fn mapped_weight(
        &self,
        pieces: &[(&MappedFile, Range<usize>)],
        dtype: DType,
        shape: &[usize],
    ) -> Result<CudaTensor, KernelError> {
        match dtype {
            DType::BF16 => self.stream_weight(pieces, shape),
            _ => self.take_weight(&mapped_tensor(pieces, dtype, shape)?),
        }
    }

    fn weight_f32(&self, _host: &candle_core::Tensor) -> Result<CudaTensor, KernelError> {
        unsupported("weight_f32")
    }

    fn upload(&self, values: &[f32], shape: &[usize]) -> Result<CudaTensor, KernelError> {
        if values.len() != shape.iter().product::<usize>() {
            return Err(shape_error("upload", format!("{} values for shape {shape:?}", values.len())));
        }
        let narrow: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
        Ok(CudaTensor::piece(self.staged(&narrow)?, shape))
    }

    fn patches(&self, pages: &[PatchPage<'_>], temporal: usize) -> Result<CudaTensor, KernelError> {
        self.take_patches(pages, temporal)
    }

    fn to_host(&self, x: &CudaTensor) -> Result<Vec<f32>, KernelError> {
        self.read(x.address(), x.elements())
    }

    fn shape(&self, x: &CudaTensor) -> Vec<usize> {
        x.shape().to_vec()
    }

    fn reshape(&self, x: &CudaTensor, shape: &[usize]) -> Result<CudaTensor, KernelError> {
        x.reshaped(shape)
    }

    fn row_range(&self, x: &CudaTensor, rows: Range<usize>) -> Result<CudaTensor, KernelError> {
        x.row_range(rows)
    }

    fn host_memory(&self, bytes: usize) -> Result<HostMemory, KernelError> {
        self.take_host_memory(bytes)
    }

    fn join_memory(&self) -> Result<(), KernelError> {
        self.memory.join_slabs()
    }

    fn wait(&self) -> Result<(), KernelError> {
        self.driver.synchronize()
    }

    fn keep(&self, x: &CudaTensor) -> Result<CudaTensor, KernelError> {
        self.kept(x)
    }

    fn tensor_bytes(&self, x: &CudaTensor) -> usize {
        x.elements() * ELEMENT
    }

    fn read_tensor(&self, x: &CudaTensor, host: &mut HostMemory, offset: usize) -> Result<(), KernelError> {
        self.copy_tensor(x, host, offset, Way::Out)
    }

    fn write_tensor(&self, shape: &[usize], host: &mut HostMemory, offset: usize) -> Result<CudaTensor, KernelError> {
        let out = self.feature(shape)?;
        self.copy_tensor(&out, host, offset, Way::Back)?;
        Ok(out)
    }

    fn indices(&self, values: Vec<u32>) -> Result<CudaIndices, KernelError> {
        Ok(CudaIndices::piece(self.staged(&values)?, &values))
    }

    fn begin(&self) -> Result<(), KernelError> {
        self.begin_step()
    }

    fn step<E: From<KernelError>>(
        &self,
        inputs: StepInputs,
        forward: &mut Forward<'_, Self, E>,
    ) -> Result<CudaLogits, E> {
        self.run_step(inputs, forward)
    }

    fn recorded_batches(&self, most: usize) -> Vec<usize> {
        if self.graphs { step::buckets(most) } else { Vec::new() }
    }

    fn logits_to_host(&self, logits: &CudaLogits) -> Result<Vec<f32>, KernelError> {
        let (_, width) = logits.logits.matrix("logits_to_host")?;
        self.read(logits.logits.address(), logits.rows * width)
    }

    fn draws(&self, _draws: &[Draw]) -> bool {
        true
    }

    fn finish(&self, drawn: Option<(&CudaLogits, &[Draw])>) -> Result<CudaFlight, KernelError> {
        self.finish_step(drawn)
    }

    fn has_finished(&self, flight: &CudaFlight) -> Result<bool, KernelError> {
        self.flight_has_finished(flight)
    }

    fn finished(&self, flight: CudaFlight) -> Result<Finished, KernelError> {
        self.land(flight)
    }

    fn frequencies(&self, inverse: &[f32], axes: &[u32], positions: usize) -> Result<CudaFrequencies, KernelError> {
        self.make_rope_table(inverse, axes, positions)
    }

    fn rope_table(
        &self,
        frequencies: &CudaFrequencies,
        positions: &CudaIndices,
    ) -> Result<RopeTable<CudaTensor>, KernelError> {
        self.gather_rope(frequencies, positions)
    }

    fn kv_cache(
        &self,
        blocks: usize,
        block_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<CudaKvCache, KernelError> {
        let op = "kv_cache";
        if block_tokens == 0 || kv_heads == 0 || head_dim == 0 {
            return Err(shape_error(op, format!("pages of {block_tokens} tokens x {kv_heads} heads x {head_dim}")));
        }
        let sizes = [blocks, block_tokens, kv_heads, head_dim, ELEMENT];
        let bytes = sizes.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
        let bytes = bytes.ok_or_else(|| shape_error(op, format!("{blocks} blocks overflow")))?;
        let pool = || self.memory.allocate(MemoryKind::KvPool, bytes);
        let (keys, values) = (pool()?, pool()?);
        self.zero(keys.pointer, bytes)?;
        self.zero(values.pointer, bytes)?;
        Ok(CudaKvCache { keys, values, blocks, block_tokens, kv_heads, head_dim })
    }

    fn kv_block_bytes(&self, caches: &[CudaKvCache]) -> usize {
        caches.iter().map(|cache| 2 * cache.half_block_bytes()).sum()
    }

    fn read_kv_block(
        &self,
        caches: &[CudaKvCache],
        block: u32,
        host: &mut HostMemory,
        offset: usize,
    ) -> Result<(), KernelError> {
        self.copy_block(caches, block, host, offset, Way::Out)
    }

    fn write_kv_block(
        &self,
        caches: &mut [CudaKvCache],
        block: u32,
        host: &mut HostMemory,
        offset: usize,
    ) -> Result<(), KernelError> {
        self.copy_block(caches, block, host, offset, Way::Back)
    }

    fn embed(&self, table: &CudaTensor, ids: &CudaIndices) -> Result<CudaTensor, KernelError> {
        self.gather_embeddings(table, ids)
    }

    fn gather_rows(&self, x: &CudaTensor, rows: &CudaIndices) -> Result<CudaTensor, KernelError> {
        self.gather("gather_rows", x, rows)
    }

    fn scatter_rows(&self, x: &CudaTensor, rows: &CudaIndices, values: &CudaTensor) -> Result<CudaTensor, KernelError> {
        self.scatter("scatter_rows", x, rows, values)
    }

    fn scatter_add_rows(
        &self,
        x: &CudaTensor,
        rows: &CudaIndices,
        values: &CudaTensor,
    ) -> Result<CudaTensor, KernelError> {
        self.scatter("scatter_add_rows", x, rows, values)
    }

    fn concat_rows(&self, parts: &[CudaTensor]) -> Result<CudaTensor, KernelError> {
        self.concat(parts)
    }

    fn linear(&self, x: &CudaTensor, w: &CudaTensor, bias: Option<&CudaTensor>) -> Result<CudaTensor, KernelError> {
        let op = "linear";
        let ((rows, inputs), (outputs, depth)) = (x.matrix(op)?, w.matrix(op)?);
        if inputs != depth || inputs == 0 {
            return Err(shape_error(op, format!("rows of {inputs} with weights for {depth}")));
        }
        if let Some(bias) = bias {
            bias.expect(op, "bias", &[outputs])?;
        }
        let out = self.activation(&[rows, outputs])?;
        if rows > 0 && outputs > 0 {
            self.linear.run(x, w, bias, &out, [rows, inputs, outputs])?;
        }
        Ok(out)
    }

    fn linear_swiglu(&self, x: &CudaTensor, gate_up: &CudaTensor) -> Result<CudaTensor, KernelError> {
        let op = "linear_swiglu";
        let ((rows, inputs), (outputs, depth)) = (x.matrix(op)?, gate_up.matrix(op)?);
        if inputs != depth || !outputs.is_multiple_of(2) {
            return Err(shape_error(op, format!("rows of {inputs} with {outputs} rows of weights for {depth}")));
        }
        let out = self.activation(&[rows, outputs / 2])?;
        let sizes = [rows, inputs, outputs];
        if self.linear.run_gated(x, gate_up, &out, sizes)? || self.gated_linear(x, gate_up, &out, sizes)? {
            return Ok(out);
        }
        // Large steps would hold it beside gate and up.
        drop(out);
        self.swiglu(&self.linear(x, gate_up, None)?)
    }

    fn add(&self, a: &CudaTensor, b: &CudaTensor) -> Result<CudaTensor, KernelError> {
        self.sum(a, b)
    }

    fn rms_norm(&self, x: &CudaTensor, w: &CudaTensor, eps: f32) -> Result<CudaTensor, KernelError> {
        self.rms(x, w, eps)
    }

    fn add_rms_norm(
        &self,
        residual: &CudaTensor,
        x: &CudaTensor,
        w: &CudaTensor,
        eps: f32,
    ) -> Result<(CudaTensor, CudaTensor), KernelError> {
        self.add_rms(residual, x, w, eps)
    }

    fn layer_norm(&self, x: &CudaTensor, w: &CudaTensor, b: &CudaTensor, eps: f32) -> Result<CudaTensor, KernelError> {
        self.layer(x, w, b, eps)
    }

    fn add_layer_norm(
        &self,
        residual: &CudaTensor,
        x: &CudaTensor,
        w: &CudaTensor,
        b: &CudaTensor,
        eps: f32,
    ) -> Result<(CudaTensor, CudaTensor), KernelError> {
        self.add_layer(residual, x, w, b, eps)
    }

    fn swiglu(&self, gate_up: &CudaTensor) -> Result<CudaTensor, KernelError> {
        self.swiglu_rows(gate_up)
    }

    fn gelu(&self, x: &CudaTensor, kind: GeluKind) -> Result<CudaTensor, KernelError> {
        self.gelu_all(x, kind)
    }

    fn qkv_norm_rope_cache_write(
        &self,
        qkv: &CudaTensor,
        q_norm: &CudaTensor,
        k_norm: &CudaTensor,
        eps: f32,
        rope: &RopeTable<CudaTensor>,
        batch: &CudaBatch,
        cache: &mut CudaKvCache,
    ) -> Result<CudaTensor, KernelError> {
        self.norm_rope_write(qkv, [q_norm, k_norm], eps, rope, batch, cache)
    }

    fn paged_attention(
        &self,
        q: &CudaTensor,
        batch: &CudaBatch,
        cache: &CudaKvCache,
        scale: f32,
    ) -> Result<CudaTensor, KernelError> {
        self.attend(q, batch, cache, scale)
    }

    fn geometry(&self, grids: &PatchGrids, inverse: &[f32], segments: Segments) -> Result<CudaGeometry, KernelError> {
        self.make_geometry(grids, inverse, segments)
    }

    fn segment_attention(
        &self,
        qkv: &CudaTensor,
        heads: usize,
        geometry: &CudaGeometry,
        scale: f32,
    ) -> Result<CudaTensor, KernelError> {
        self.attend_segments(qkv, heads, geometry, scale)
    }

    fn interpolate_grids(&self, table: &CudaTensor, geometry: &CudaGeometry) -> Result<CudaTensor, KernelError> {
        self.interpolate(table, geometry)
    }

    fn router_softmax(&self, _: &CudaTensor, _: &CudaTensor, _: usize, _: bool) -> Result<(), KernelError> {
        unsupported("router_softmax")
    }

    fn router_sigmoid(
        &self,
        _: &CudaTensor,
        _: &CudaTensor,
        _: &CudaTensor,
        _: SigmoidChoice,
    ) -> Result<(), KernelError> {
        unsupported("router_sigmoid")
    }

    fn routing_to_host(&self, (): &()) -> Result<(Vec<u32>, Vec<f32>), KernelError> {
        unsupported("routing_to_host")
    }

    fn moe_experts(&self, _: &CudaTensor, _: &CudaTensor, _: &CudaTensor, (): &()) -> Result<CudaTensor, KernelError> {
        unsupported("moe_experts")
    }

    fn mla_cache(&self, _: usize, _: usize, _: usize, _: usize) -> Result<CudaKvCache, KernelError> {
        unsupported("mla_cache")
    }

    fn mla_norm_rope_cache_write(
        &self,
        _: &CudaTensor,
        _: &CudaTensor,
        _: &CudaTensor,
        _: f32,
        _: usize,
        _: &RopeTable<CudaTensor>,
        _: &CudaBatch,
        _: &mut CudaKvCache,
    ) -> Result<CudaTensor, KernelError> {
        unsupported("mla_norm_rope_cache_write")
    }

    fn mla_attention(
        &self,
        _: &CudaTensor,
        _: &CudaTensor,
        _: usize,
        _: &CudaBatch,
        _: &CudaKvCache,
        _: f32,
    ) -> Result<CudaTensor, KernelError> {
        unsupported("mla_attention")
    }
}
