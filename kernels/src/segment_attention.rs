//! Bidirectional attention within segments of rows, with 2-D RoPE in f32: the vision tower's.
//!
//! Keys and values of one head and segment are packed into pages of the cache's layout, then `attend` does the arithmetic.

use candle_core::Tensor;

use crate::attend::{Attend, ROWS, attend};
use crate::backend::Segments;
use crate::error::KernelError;
use crate::host::Host;
use crate::kv_cache::{PageLayout, put_key, put_value};
use crate::simd::Vectors;
use crate::threads::SharedMut;
use crate::view::{View, shape_error, tensor};

/// Tokens of one packed page.
const PAGE_TOKENS: usize = 512;

/// Half-split rotation in f32, rounded once.
#[inline(always)]
fn rotate<E: Vectors>(head: &[E], cos: &[f32], sin: &[f32], out: &mut [E]) {
    let half = cos.len();
    for i in 0..half {
        let (x, y) = (head[i].widen(), head[i + half].widen());
        out[i] = E::narrow(x * cos[i] - y * sin[i]);
        out[i + half] = E::narrow(y * cos[i] + x * sin[i]);
    }
}

/// See [`crate::Backend::segment_attention`].
pub(crate) fn segment_attention<E: Vectors>(
    host: &Host,
    qkv: &Tensor,
    heads: usize,
    [cos, sin]: [&[f32]; 2],
    segments: &Segments,
    scale: f32,
) -> Result<Tensor, KernelError> {
    let op = "segment_attention";
    let qkv = View::<E>::new(op, qkv)?;
    let (rows, width) = qkv.matrix()?;
    if heads == 0 || width == 0 || width % (6 * heads) != 0 {
        return Err(shape_error(op, format!("row length {width} is not 3 x {heads} heads of an even size")));
    }
    let head_dim = width / (3 * heads);
    let half = head_dim / 2;
    if cos.len() != rows * half || sin.len() != rows * half {
        return Err(shape_error(op, format!("{} cos and {} sin for {rows} x {half}", cos.len(), sin.len())));
    }
    let start = &segments.start;
    let ends = start.first() == Some(&0) && start.last().is_some_and(|&end| end as usize == rows);
    if !ends || start.windows(2).any(|pair| pair[0] > pair[1]) {
        return Err(shape_error(op, format!("segment starts {start:?} do not span {rows} rows")));
    }
    let source = qkv.data()?;
    let mut out = vec![E::default(); rows * heads * head_dim];
    let shared = SharedMut(out.as_mut_ptr());
    host.threads.run((start.len() - 1) * heads, &|index| {
        let (segment, head) = (index / heads, index % heads);
        let range = start[segment] as usize..start[segment + 1] as usize;
        let part = |row: usize, which: usize| &source[row * width + (which * heads + head) * head_dim..][..head_dim];
        let rotated = |row: usize, which: usize, out: &mut [E]| {
            rotate(part(row, which), &cos[row * half..][..half], &sin[row * half..][..half], out);
        };
        let layout = PageLayout::new::<E>(PAGE_TOKENS.min(range.len()).max(1), 1, head_dim, head_dim);
        let mut key = vec![E::default(); head_dim];
        let packed: Vec<_> = range
            .clone()
            .step_by(layout.block_tokens)
            .map(|first| {
                let mut keys = vec![0; layout.key_page_words()];
                let mut values = vec![0; layout.value_page_words()];
                for (i, row) in (first..range.end.min(first + layout.block_tokens)).enumerate() {
                    rotated(row, 1, &mut key);
                    put_key(&layout, &mut keys, i, &key);
                    put_value(&layout, &mut values, i, part(row, 2));
                }
                (keys, values)
            })
            .collect();
        let pages: Vec<_> = packed.iter().map(|(keys, values)| (keys.as_slice(), values.as_slice())).collect();
        for first in range.clone().step_by(ROWS) {
            let count = ROWS.min(range.end - first);
            let mut queries = vec![E::default(); count * head_dim];
            for (i, query) in queries.chunks_exact_mut(head_dim).enumerate() {
                rotated(first + i, 0, query);
            }
            let visible = vec![range.len(); count];
            let mut result = vec![E::default(); queries.len()];
            attend(
                host.isa,
                Attend { layout, pages: &pages, queries: &queries, visible: &visible, scale, out: &mut result },
            );
            for (i, result) in result.chunks_exact(head_dim).enumerate() {
                let at = ((first + i) * heads + head) * head_dim;
                // SAFETY: a row's outputs of one head belong to one task, and they are within `out`.
                unsafe { std::ptr::copy_nonoverlapping(result.as_ptr(), shared.get().add(at), head_dim) };
            }
        }
    });
    tensor(out, &[rows, heads * head_dim])
}
