//! RMSNorm and LayerNorm, each also behind a residual add, and plain addition.
//!
//! Every sum over a row runs over sixteen interleaved lanes joined by a fixed tree, so a row's result depends on that row only.

use candle_core::Tensor;

use crate::element::Element;
use crate::error::KernelError;
use crate::host::Host;
use crate::simd::{self, Kernel, LANES, Lanes, Vectors};
use crate::view::{View, shape_error, tensor};

/// Elements of one thread's piece of a row-wise op: below this, splitting costs more than it brings.
pub(crate) const PIECE_ELEMENTS: usize = 1 << 14;

/// Sum of `term` over a row, in sixteen lanes and then pairwise.
#[inline(always)]
pub(crate) fn lane_sum<E: Element>(row: &[E], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += term(value.widen());
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += term(value.widen());
    }
    tree_sum(&lanes)
}

/// Sum of sixteen lanes: lane i with lane i + 8, then + 4, + 2, + 1.
#[inline(always)]
pub(crate) fn tree_sum(lanes: &[f32; LANES]) -> f32 {
    let mut folded = *lanes;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            folded[i] += folded[i + half];
        }
    }
    folded[0]
}

/// One row of RMSNorm: t = round(x / sqrt(mean(x^2) + eps)); y = round(w t).
#[inline(always)]
pub(crate) fn rms_norm_row<E: Element>(x: &[E], w: &[E], eps: f32, out: &mut [E]) {
    let mean = lane_sum(x, |v| v * v) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
        *o = E::narrow(w.widen() * E::round(x.widen() * scale));
    }
}

/// Row length of `x`.
fn width_of<E: Element>(op: &'static str, x: &View<'_, E>) -> Result<usize, KernelError> {
    match x.dims().last() {
        Some(&width) if width > 0 => Ok(width),
        _ => Err(shape_error(op, format!("cannot normalise shape {:?}", x.dims()))),
    }
}

/// Rows of one thread's piece, for rows of `width`.
fn piece_rows(width: usize) -> usize {
    (PIECE_ELEMENTS / width).max(1)
}

/// A tensor of the shape of `x`: `op` makes each piece of it, `piece` elements long, out of the same place in `x`, on all threads.
pub(crate) fn in_pieces<E: Vectors>(
    host: &Host,
    x: &View<'_, E>,
    piece: usize,
    op: impl Fn(&[E], &mut [E]) + Sync,
) -> Result<Tensor, KernelError> {
    let source = x.data()?;
    let mut out = vec![E::default(); source.len()];
    host.threads.for_pieces(&mut out, piece, |index, out| op(&source[index * piece..][..out.len()], out));
    tensor(out, x.dims())
}

struct RmsNorm<'a, E> {
    x: &'a [E],
    w: &'a [E],
    eps: f32,
    out: &'a mut [E],
}

impl<E: Element> Kernel<E> for RmsNorm<'_, E> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        let width = self.w.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            rms_norm_row(x, self.w, self.eps, out);
        }
    }
}

/// See [`crate::Backend::rms_norm`].
pub(crate) fn rms_norm<E: Vectors>(host: &Host, x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor, KernelError> {
    let op = "rms_norm";
    let (x, w) = (View::<E>::new(op, x)?, View::<E>::new(op, w)?);
    let width = width_of(op, &x)?;
    w.expect_shape("weight", &[width])?;
    let w = w.data()?;
    in_pieces(host, &x, piece_rows(width) * width, |x, out| simd::run(host.isa, RmsNorm { x, w, eps, out }))
}

struct Add<'a, E> {
    a: &'a [E],
    b: &'a [E],
    out: &'a mut [E],
}

impl<E: Element> Kernel<E> for Add<'_, E> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        for ((out, a), b) in self.out.iter_mut().zip(self.a).zip(self.b) {
            *out = E::narrow(a.widen() + b.widen());
        }
    }
}

/// See [`crate::Backend::add`].
pub(crate) fn add<E: Vectors>(host: &Host, a: &Tensor, b: &Tensor) -> Result<Tensor, KernelError> {
    let op = "add";
    let (a, b) = (View::<E>::new(op, a)?, View::<E>::new(op, b)?);
    b.expect_shape("second operand", a.dims())?;
    let (left, right) = (a.data()?, b.data()?);
    let mut out = vec![E::default(); left.len()];
    host.threads.for_pieces(&mut out, PIECE_ELEMENTS, |index, out| {
        let range = index * PIECE_ELEMENTS..index * PIECE_ELEMENTS + out.len();
        simd::run(host.isa, Add { a: &left[range.clone()], b: &right[range], out });
    });
    tensor(out, a.dims())
}

/// See [`crate::Backend::add_rms_norm`].
pub(crate) fn add_rms_norm<E: Vectors>(
    host: &Host,
    residual: &Tensor,
    x: &Tensor,
    w: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor), KernelError> {
    let sum = add::<E>(host, residual, x)?;
    let normed = rms_norm::<E>(host, &sum, w, eps)?;
    Ok((sum, normed))
}

struct LayerNorm<'a, E> {
    x: &'a [E],
    w: &'a [E],
    b: &'a [E],
    eps: f32,
    out: &'a mut [E],
}

impl<E: Element> Kernel<E> for LayerNorm<'_, E> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        let width = self.w.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let mean = lane_sum(x, |v| v) / width as f32;
            let variance = lane_sum(x, |v| (v - mean) * (v - mean)) / width as f32;
            let scale = 1.0 / (variance + self.eps).sqrt();
            for (((o, x), w), b) in out.iter_mut().zip(x).zip(self.w).zip(self.b) {
                *o = E::narrow((x.widen() - mean) * scale * w.widen() + b.widen());
            }
        }
    }
}

/// See [`crate::Backend::layer_norm`].
pub(crate) fn layer_norm<E: Vectors>(
    host: &Host,
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    eps: f32,
) -> Result<Tensor, KernelError> {
    let op = "layer_norm";
    let (x, w, b) = (View::<E>::new(op, x)?, View::<E>::new(op, w)?, View::<E>::new(op, b)?);
    let width = width_of(op, &x)?;
    w.expect_shape("weight", &[width])?;
    b.expect_shape("bias", &[width])?;
    let (w, b) = (w.data()?, b.data()?);
    in_pieces(host, &x, piece_rows(width) * width, |x, out| simd::run(host.isa, LayerNorm { x, w, b, eps, out }))
}

/// See [`crate::Backend::add_layer_norm`].
pub(crate) fn add_layer_norm<E: Vectors>(
    host: &Host,
    residual: &Tensor,
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor), KernelError> {
    let sum = add::<E>(host, residual, x)?;
    let normed = layer_norm::<E>(host, &sum, w, b, eps)?;
    Ok((sum, normed))
}
