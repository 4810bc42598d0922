//! Per-head RMSNorm of queries and keys, half-split RoPE, and the write of keys and values into their pages.

use candle_core::Tensor;

use crate::backend::RopeTable;
use crate::batch;
use crate::element::Element;
use crate::error::KernelError;
use crate::host::Host;
use crate::kv_cache::{CpuKvCache, Token};
use crate::norm::{PIECE_ELEMENTS, rms_norm_row};
use crate::simd::{self, Kernel, LANES, Lanes, Vectors};
use crate::step::Ragged;
use crate::threads::SharedMut;
use crate::view::{View, shape_error, tensor};

/// Rotates one head in place: out[i] = round(round(x[i] c) - round(x[i + d/2] s)), out[i + d/2] = round(round(x[i + d/2] c) +
/// round(x[i] s)).
#[inline(always)]
fn rotate_half_split<E: Element>(head: &mut [E], cos: &[E], sin: &[E]) {
    let (low, high) = head.split_at_mut(cos.len());
    let ((low, low_rest), (high, high_rest)) = (low.as_chunks_mut::<LANES>(), high.as_chunks_mut::<LANES>());
    let ((cos, cos_rest), (sin, sin_rest)) = (cos.as_chunks::<LANES>(), sin.as_chunks::<LANES>());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        // By value: the compiler cannot see that the halves do not overlap, and would not vectorise.
        (*low, *high) = rotate_pairs(*low, *high, cos, sin);
    }
    for (((low, high), cos), sin) in low_rest.iter_mut().zip(high_rest).zip(cos_rest).zip(sin_rest) {
        ([*low], [*high]) = rotate_pairs([*low], [*high], &[*cos], &[*sin]);
    }
}

/// The new halves of `N` pairs.
#[inline(always)]
fn rotate_pairs<E: Element, const N: usize>(low: [E; N], high: [E; N], cos: &[E; N], sin: &[E; N]) -> ([E; N], [E; N]) {
    let (mut new_low, mut new_high) = ([E::default(); N], [E::default(); N]);
    for i in 0..N {
        let (x, y, c, s) = (low[i].widen(), high[i].widen(), cos[i].widen(), sin[i].widen());
        new_low[i] = E::narrow(E::round(x * c) - E::round(y * s));
        new_high[i] = E::narrow(E::round(y * c) + E::round(x * s));
    }
    (new_low, new_high)
}

/// Queries or keys of some tokens: `heads` heads from each row of `source`.
struct NormRotate<'a, E> {
    source: &'a [E],
    /// Row length of `source`.
    width: usize,
    heads: usize,
    weight: &'a [E],
    eps: f32,
    cos: &'a [E],
    sin: &'a [E],
    out: &'a mut [E],
}

impl<E: Element> Kernel<E> for NormRotate<'_, E> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        let (head_dim, half) = (self.weight.len(), self.weight.len() / 2);
        let angles = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
        let outputs = self.out.chunks_exact_mut(self.heads * head_dim);
        for ((row, out), (cos, sin)) in self.source.chunks(self.width).zip(outputs).zip(angles) {
            for (head, out) in row.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
                rms_norm_row(head, self.weight, self.eps, out);
                rotate_half_split(out, cos, sin);
            }
        }
    }
}

/// See [`crate::Backend::qkv_norm_rope_cache_write`].
pub(crate) fn qkv_norm_rope_cache_write<E: Vectors>(
    host: &Host,
    qkv: &Tensor,
    [q_norm, k_norm]: [&Tensor; 2],
    eps: f32,
    rope: &RopeTable<Tensor>,
    batch: &Ragged,
    cache: &mut CpuKvCache,
) -> Result<Tensor, KernelError> {
    let op = "qkv_norm_rope_cache_write";
    let qkv = View::<E>::new(op, qkv)?;
    let (tokens, width) = qkv.matrix()?;
    let (head_dim, kv_heads) = (cache.key_dim(), cache.kv_heads());
    if head_dim % 2 != 0 || cache.value_dim() != head_dim {
        return Err(shape_error(op, format!("keys of {head_dim} and values of {}", cache.value_dim())));
    }
    let heads = width / head_dim;
    if width % head_dim != 0 || heads <= 2 * kv_heads {
        return Err(shape_error(op, format!("row length {width} with {kv_heads} kv heads of {head_dim}")));
    }
    let query_heads = heads - 2 * kv_heads;
    let (q_norm, k_norm) = (View::<E>::new(op, q_norm)?, View::<E>::new(op, k_norm)?);
    q_norm.expect_shape("q_norm", &[head_dim])?;
    k_norm.expect_shape("k_norm", &[head_dim])?;
    let (cos, sin) = (View::<E>::new(op, &rope.cos)?, View::<E>::new(op, &rope.sin)?);
    cos.expect_shape("cos", &[tokens, head_dim / 2])?;
    sin.expect_shape("sin", &[tokens, head_dim / 2])?;
    cache.expect_element::<E>(op)?;
    batch::check(op, batch, tokens, cache.blocks(), cache.block_tokens())?;

    let (source, q_norm, k_norm) = (qkv.data()?, q_norm.data()?, k_norm.data()?);
    let (cos, sin) = (cos.data()?, sin.data()?);
    let (q_width, kv_width) = (query_heads * head_dim, kv_heads * head_dim);
    let mut queries = vec![E::default(); tokens * q_width];
    let mut keys = vec![E::default(); tokens * kv_width];
    let (q_out, k_out) = (SharedMut(queries.as_mut_ptr()), SharedMut(keys.as_mut_ptr()));
    let piece = (PIECE_ELEMENTS / width).max(1);
    host.threads.run(tokens.div_ceil(piece), &|index| {
        let (from, to) = (index * piece, tokens.min((index + 1) * piece));
        let angles = from * head_dim / 2..to * head_dim / 2;
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        let source = &source[from * width..to * width];
        // SAFETY: a token's rows belong to one task, and both ranges are within their vectors.
        let (q_out, k_out) = unsafe {
            (
                std::slice::from_raw_parts_mut(q_out.get().add(from * q_width), (to - from) * q_width),
                std::slice::from_raw_parts_mut(k_out.get().add(from * kv_width), (to - from) * kv_width),
            )
        };
        let q = NormRotate { source, width, heads: query_heads, weight: q_norm, eps, cos, sin, out: q_out };
        simd::run(host.isa, q);
        let source = &source[q_width..];
        simd::run(host.isa, NormRotate { source, width, heads: kv_heads, weight: k_norm, eps, cos, sin, out: k_out });
    });

    let places = batch::places(batch, cache.block_tokens());
    cache.write(host, kv_heads * tokens * head_dim, |head, write| {
        for (token, &(block, row)) in places.iter().enumerate() {
            let key = &keys[token * kv_width + head * head_dim..][..head_dim];
            let value = &source[token * width + q_width + kv_width + head * head_dim..][..head_dim];
            write(Token { block, row, key, value });
        }
    });
    tensor(queries, &[tokens, q_width])
}
