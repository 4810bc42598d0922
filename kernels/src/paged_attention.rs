//! Causal attention over paged keys and values: checks and the split into tasks; the arithmetic is in `attend`.

use candle_core::Tensor;

use crate::attend::{Attend, ROWS, attend};
use crate::batch;
use crate::error::KernelError;
use crate::host::Host;
use crate::kv_cache::CpuKvCache;
use crate::simd::Vectors;
use crate::step::Ragged;
use crate::threads::SharedMut;
use crate::view::{View, shape_error, tensor};

/// Consecutive query tokens of one sequence, one kv head.
struct Task {
    sequence: usize,
    head: usize,
    first_token: usize,
    tokens: usize,
    /// Tokens that the first query token sees.
    visible: usize,
}

/// See [`crate::Backend::paged_attention`].
pub(crate) fn paged_attention<E: Vectors>(
    host: &Host,
    q: &Tensor,
    batch: &Ragged,
    cache: &CpuKvCache,
    scale: f32,
) -> Result<Tensor, KernelError> {
    let op = "paged_attention";
    let q = View::<E>::new(op, q)?;
    let (tokens, width) = q.matrix()?;
    let (head_dim, kv_heads) = (cache.key_dim(), cache.kv_heads());
    let heads = width / head_dim;
    if width % head_dim != 0 || heads % kv_heads != 0 || heads == 0 {
        return Err(shape_error(op, format!("row length {width} with {kv_heads} kv heads of {head_dim}")));
    }
    if cache.value_dim() != head_dim {
        return Err(shape_error(op, "the pool holds latents, not keys and values"));
    }
    batch::check(op, batch, tokens, cache.blocks(), cache.block_tokens())?;
    cache.expect_element::<E>(op)?;
    let source = q.data()?;
    let tasks = tasks(batch, kv_heads, heads / kv_heads);
    let mut out = vec![E::default(); source.len()];
    let shared = SharedMut(out.as_mut_ptr());
    host.threads.run(tasks.len(), &|index| {
        let task = &tasks[index];
        let group = heads / kv_heads * head_dim;
        let mut queries = Vec::with_capacity(task.tokens * group);
        let mut visible = Vec::with_capacity(task.tokens * heads / kv_heads);
        for i in 0..task.tokens {
            let row = (task.first_token + i) * width + task.head * group;
            queries.extend_from_slice(&source[row..row + group]);
            visible.extend(std::iter::repeat_n(task.visible + i, heads / kv_heads));
        }
        let pages: Vec<_> = batch.blocks[task.sequence]
            .iter()
            .take((task.visible + task.tokens - 1).div_ceil(cache.block_tokens()))
            .map(|&block| (cache.key_page(block as usize, task.head), cache.value_page(block as usize, task.head)))
            .collect();
        let mut result = vec![E::default(); queries.len()];
        let layout = *cache.layout();
        attend(
            host.isa,
            Attend { layout, pages: &pages, queries: &queries, visible: &visible, scale, out: &mut result },
        );
        for (i, result) in result.chunks_exact(group).enumerate() {
            let row = (task.first_token + i) * width + task.head * group;
            // SAFETY: a token's outputs of one kv head belong to one task, and `row + group` is within `out`.
            unsafe { std::ptr::copy_nonoverlapping(result.as_ptr(), shared.get().add(row), group) };
        }
    });
    tensor(out, &[tokens, width])
}

/// Cuts a batch into tasks of about [`ROWS`] query rows.
fn tasks(batch: &Ragged, kv_heads: usize, group: usize) -> Vec<Task> {
    let step = (ROWS / group).max(1);
    let mut tasks = Vec::new();
    for sequence in 0..batch.context.len() {
        let (rows, first) = batch::queries(batch, sequence);
        for head in 0..kv_heads {
            for offset in (0..rows.len()).step_by(step) {
                tasks.push(Task {
                    sequence,
                    head,
                    first_token: rows.start + offset,
                    tokens: step.min(rows.len() - offset),
                    visible: first + offset + 1,
                });
            }
        }
    }
    tasks
}
