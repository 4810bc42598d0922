//! SwiGLU and GELU.

use candle_core::Tensor;

use crate::backend::GeluKind;
use crate::element::Element;
use crate::error::KernelError;
use crate::host::Host;
use crate::norm::{PIECE_ELEMENTS, in_pieces};
use crate::simd::math::{erf, sigmoid};
use crate::simd::{self, Kernel, Lanes, Vectors};
use crate::view::{View, shape_error, tensor};

/// Rows of gate and up, side by side: out = round(round(silu(gate)) up).
struct SwiGlu<'a, E> {
    gate_up: &'a [E],
    /// Row length of the output, not zero.
    half: usize,
    out: &'a mut [E],
}

impl<E: Element> Kernel<E> for SwiGlu<'_, E> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        for (row, out) in self.gate_up.chunks_exact(2 * self.half).zip(self.out.chunks_exact_mut(self.half)) {
            let (gate, up) = row.split_at(self.half);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                let gate = gate.widen();
                *out = E::narrow(E::round(gate * sigmoid(gate)) * up.widen());
            }
        }
    }
}

/// See [`crate::Backend::swiglu`].
pub(crate) fn swiglu<E: Vectors>(host: &Host, gate_up: &Tensor) -> Result<Tensor, KernelError> {
    let op = "swiglu";
    let gate_up = View::<E>::new(op, gate_up)?;
    let (rows, width) = gate_up.matrix()?;
    if width % 2 != 0 {
        return Err(shape_error(op, format!("row length {width} is odd")));
    }
    let half = width / 2;
    let source = gate_up.data()?;
    let mut out = vec![E::default(); rows * half];
    swiglu_rows(host, source, half, &mut out);
    tensor(out, &[rows, half])
}

/// Rows of gate and up in `gate_up` to rows of `half` in `out`, on all threads.
pub(crate) fn swiglu_rows<E: Vectors>(host: &Host, gate_up: &[E], half: usize, out: &mut [E]) {
    let piece = (PIECE_ELEMENTS / 4 / half.max(1)).max(1) * half;
    host.threads.for_pieces(out, piece, |index, out| {
        let gate_up = &gate_up[2 * index * piece..][..2 * out.len()];
        simd::run(host.isa, SwiGlu { gate_up, half, out });
    });
}

struct Gelu<'a, E> {
    x: &'a [E],
    kind: GeluKind,
    out: &'a mut [E],
}

impl<E: Element> Kernel<E> for Gelu<'_, E> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        let pairs = self.out.iter_mut().zip(self.x);
        match self.kind {
            // 0.5 (1 + tanh y) = 1 / (1 + e^-2y), which also keeps the digits of large negative x.
            GeluKind::Tanh => pairs.for_each(|(out, x)| {
                let x = x.widen();
                let y = 0.797_884_6 * (x + 0.044_715 * x * x * x);
                *out = E::narrow(x * sigmoid(2.0 * y));
            }),
            GeluKind::Erf => pairs.for_each(|(out, x)| {
                let x = x.widen();
                *out = E::narrow(0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)));
            }),
        }
    }
}

/// See [`crate::Backend::gelu`].
pub(crate) fn gelu<E: Vectors>(host: &Host, x: &Tensor, kind: GeluKind) -> Result<Tensor, KernelError> {
    let x = View::<E>::new("gelu", x)?;
    in_pieces(host, &x, PIECE_ELEMENTS / 4, |x, out| simd::run(host.isa, Gelu { x, kind, out }))
}
