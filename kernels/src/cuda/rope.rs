//! Launches of `rope.cu`: the table of cos and sin, its rows of a step, and the fused pass before attention.

use super::CudaBackend;
use super::attention::{Heads, MOST_HEAD_DIM};
use super::driver::{Argument, Launch};
use super::tensor::{CudaBatch, CudaFrequencies, CudaIndices, CudaKvCache, CudaTensor, ELEMENT};
use crate::angles;
use crate::backend::RopeTable;
use crate::error::KernelError;
use crate::view::shape_error;

/// Heads of one block of the fused pass before attention.
const HEADS_A_BLOCK: usize = 8;
/// Threads of a block.
const MOST_THREADS: usize = 1024;

/// The kernel that takes `heads` heads of `dim` elements 16 bytes at a time, and its threads, if there is one.
fn whole_vectors(dim: usize, heads: usize) -> Option<(&'static str, u32)> {
    let kernel = match dim {
        64 => "qkv_norm_rope_cache_write_d64",
        128 => "qkv_norm_rope_cache_write_d128",
        256 => "qkv_norm_rope_cache_write_d256",
        _ => return None,
    };
    let threads = (heads * (dim / 16)).next_multiple_of(32);
    (threads <= MOST_THREADS).then_some((kernel, threads as u32))
}

impl CudaBackend {
    /// See [`crate::Backend::frequencies`].
    pub(super) fn make_rope_table(
        &self,
        inverse: &[f32],
        axes: &[u32],
        positions: usize,
    ) -> Result<CudaFrequencies, KernelError> {
        angles::check("frequencies", inverse, axes)?;
        let (half, shape) = (inverse.len(), [positions, inverse.len()]);
        let [cos, sin] =
            [self.memory.allocate(positions * half * ELEMENT)?, self.memory.allocate(positions * half * ELEMENT)?]
                .map(|memory| CudaTensor::owned(memory, &shape));
        let frequencies = self.staged(inverse)?;
        let count = positions * half;
        let arguments = [
            Argument::Pointer(frequencies.pointer),
            cos.argument(),
            sin.argument(),
            Argument::Int(half as i32),
            Argument::Size(count as u64),
        ];
        self.driver.launch("rope_table", Launch::rows(count.div_ceil(256), 256).alone(), &arguments)?;
        let own_axes = self.memory.allocate(size_of_val(axes))?;
        self.write(axes, own_axes.pointer)?;
        Ok(CudaFrequencies { cos, sin, axes: own_axes, positions, count: half })
    }

    /// See [`crate::Backend::rope_table`].
    pub(super) fn gather_rope(
        &self,
        frequencies: &CudaFrequencies,
        positions: &CudaIndices,
    ) -> Result<RopeTable<CudaTensor>, KernelError> {
        let op = "rope_table";
        if !positions.count.is_multiple_of(3) {
            return Err(shape_error(op, format!("{} positions are not rows of three", positions.count)));
        }
        positions.check(op, frequencies.positions)?;
        let (tokens, half) = (positions.count / 3, frequencies.count);
        let (cos, sin) = (self.activation(&[tokens, half])?, self.activation(&[tokens, half])?);
        let arguments = [
            positions.argument(),
            Argument::Pointer(frequencies.axes.pointer),
            frequencies.cos.argument(),
            frequencies.sin.argument(),
            cos.argument(),
            sin.argument(),
            Argument::Int(half as i32),
            Argument::Int(frequencies.positions as i32),
            Argument::Int((tokens * half) as i32),
        ];
        self.driver.launch("rope_gather", Launch::rows((tokens * half).div_ceil(128), 128), &arguments)?;
        Ok(RopeTable { cos, sin })
    }

    #[allow(clippy::too_many_arguments)] // As the trait's method.
    pub(super) fn norm_rope_write(
        &self,
        qkv: &CudaTensor,
        [q_norm, k_norm]: [&CudaTensor; 2],
        eps: f32,
        rope: &RopeTable<CudaTensor>,
        batch: &CudaBatch,
        cache: &CudaKvCache,
    ) -> Result<CudaTensor, KernelError> {
        let op = "qkv_norm_rope_cache_write";
        let (tokens, width) = qkv.matrix(op)?;
        let Heads { query, kv, dim } = cache.heads(op, width, 2 * cache.kv_heads)?;
        if !dim.is_multiple_of(2) || dim > MOST_HEAD_DIM {
            return Err(shape_error(op, format!("heads of {dim}: even sizes up to {MOST_HEAD_DIM} are taken")));
        }
        q_norm.expect(op, "q_norm", &[dim])?;
        k_norm.expect(op, "k_norm", &[dim])?;
        rope.cos.expect(op, "cos", &[tokens, dim / 2])?;
        rope.sin.expect(op, "sin", &[tokens, dim / 2])?;
        cache.check(op, batch, tokens)?;
        let out = self.activation(&[tokens, query * dim])?;
        let mut arguments = vec![
            qkv.argument(),
            q_norm.argument(),
            k_norm.argument(),
            rope.cos.argument(),
            rope.sin.argument(),
            Argument::Pointer(batch.slots),
            out.argument(),
            Argument::Pointer(cache.keys.pointer),
            Argument::Pointer(cache.values.pointer),
            Argument::Int(query as i32),
            Argument::Int(kv as i32),
        ];
        match whole_vectors(dim, query + 2 * kv) {
            Some((kernel, threads)) => {
                arguments.push(Argument::Float(eps));
                self.driver.launch(kernel, Launch::rows(tokens, threads), &arguments)?;
            }
            None => {
                arguments.extend([Argument::Int(dim as i32), Argument::Float(eps)]);
                let blocks = (query + 2 * kv).div_ceil(HEADS_A_BLOCK);
                let shape = Launch::rows(tokens, 32 * HEADS_A_BLOCK as u32).grid_y(blocks);
                self.driver.launch("qkv_norm_rope_cache_write_any", shape, &arguments)?;
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_heads_go_by_whole_vectors() {
        assert_eq!(whole_vectors(128, 48), Some(("qkv_norm_rope_cache_write_d128", 384)));
        assert_eq!(whole_vectors(64, 3), Some(("qkv_norm_rope_cache_write_d64", 32)));
        assert_eq!(whole_vectors(96, 48), None);
        assert_eq!(whole_vectors(256, 65), None);
    }
}
