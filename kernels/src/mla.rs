//! Latent attention's inputs: the norm of latents, RoPE of interleaved pairs, and the write into latent pages.
//!
//! A latent page is a key page of `latent + rope` elements; its values are the latents in it, so that the absorbed form is plain
//! attention with one kv head.

use candle_core::Tensor;

use crate::backend::RopeTable;
use crate::batch;
use crate::element::Element;
use crate::error::KernelError;
use crate::host::Host;
use crate::kv_cache::{CpuKvCache, Token};
use crate::norm::{PIECE_ELEMENTS, rms_norm_row};
use crate::simd::Vectors;
use crate::step::Ragged;
use crate::view::{View, shape_error, tensor};

/// Pairs (x[2i], x[2i + 1]) rotated; the results come out as in Hugging Face: all firsts, then all seconds.
fn rotate_interleaved<E: Element>(x: &[E], cos: &[E], sin: &[E], out: &mut [E]) {
    let (low, high) = out.split_at_mut(cos.len());
    for (i, pair) in x.as_chunks::<2>().0.iter().enumerate() {
        let [x, y] = pair.map(Element::widen);
        let (c, s) = (cos[i].widen(), sin[i].widen());
        low[i] = E::narrow(E::round(x * c) - E::round(y * s));
        high[i] = E::narrow(E::round(y * c) + E::round(x * s));
    }
}

/// See [`crate::Backend::mla_norm_rope_cache_write`].
pub(crate) fn norm_rope_cache_write<E: Vectors>(
    host: &Host,
    [q, kv_a, kv_norm]: [&Tensor; 3],
    eps: f32,
    heads: usize,
    rope: &RopeTable<Tensor>,
    batch: &Ragged,
    cache: &mut CpuKvCache,
) -> Result<Tensor, KernelError> {
    let op = "mla_norm_rope_cache_write";
    let latent = cache.value_dim();
    let Some(rope_dim) = cache.key_dim().checked_sub(latent).filter(|rope| rope % 2 == 0 && *rope > 0) else {
        return Err(shape_error(op, format!("keys of {} over latents of {latent}", cache.key_dim())));
    };
    let (q, kv_a, kv_norm) = (View::<E>::new(op, q)?, View::<E>::new(op, kv_a)?, View::<E>::new(op, kv_norm)?);
    let (tokens, q_width) = q.matrix()?;
    if heads == 0 || q_width % heads != 0 || q_width / heads < rope_dim {
        return Err(shape_error(op, format!("q {:?} of {heads} heads with {rope_dim} to rotate", q.dims())));
    }
    kv_a.expect_shape("kv_a", &[tokens, latent + rope_dim])?;
    kv_norm.expect_shape("kv_norm", &[latent])?;
    let (cos, sin) = (View::<E>::new(op, &rope.cos)?, View::<E>::new(op, &rope.sin)?);
    cos.expect_shape("cos", &[tokens, rope_dim / 2])?;
    sin.expect_shape("sin", &[tokens, rope_dim / 2])?;
    cache.expect_element::<E>(op)?;
    batch::check(op, batch, tokens, cache.blocks(), cache.block_tokens())?;

    let (source, kv_a, kv_norm) = (q.data()?, kv_a.data()?, kv_norm.data()?);
    let (cos, sin) = (cos.data()?, sin.data()?);
    let angles = |token: usize| {
        let range = token * rope_dim / 2..(token + 1) * rope_dim / 2;
        (&cos[range.clone()], &sin[range])
    };
    let mut out = source.to_vec();
    let piece = (PIECE_ELEMENTS / q_width).max(1) * q_width;
    host.threads.for_pieces(&mut out, piece, |index, out| {
        let first = index * piece / q_width;
        for (i, row) in out.chunks_exact_mut(q_width).enumerate() {
            let (cos, sin) = angles(first + i);
            let source = &source[(first + i) * q_width..][..q_width];
            for (head, out) in source.chunks_exact(q_width / heads).zip(row.chunks_exact_mut(q_width / heads)) {
                let nope = head.len() - rope_dim;
                rotate_interleaved(&head[nope..], cos, sin, &mut out[nope..]);
            }
        }
    });
    let places = batch::places(batch, cache.block_tokens());
    cache.write(host, tokens * (latent + rope_dim), |_, write| {
        let mut key = vec![E::default(); latent + rope_dim];
        for (token, &(block, row)) in places.iter().enumerate() {
            let (cos, sin) = angles(token);
            let source = &kv_a[token * key.len()..][..key.len()];
            rms_norm_row(&source[..latent], kv_norm, eps, &mut key[..latent]);
            rotate_interleaved(&source[latent..], cos, sin, &mut key[latent..]);
            write(Token { block, row, key: &key, value: &key[..latent] });
        }
    });
    tensor(out, &[tokens, q_width])
}
