//! The experts of a mixture: rows grouped by expert, one product after the other, only touched experts read.

use candle_core::Tensor;

use crate::activation::swiglu_rows;
use crate::error::KernelError;
use crate::host::Host;
use crate::matmul::{Product, matmul};
use crate::router::CpuRouting;
use crate::simd::Vectors;
use crate::view::{View, shape_error, tensor};

/// See [`crate::Backend::moe_experts`].
pub(crate) fn experts<E: Vectors>(
    host: &Host,
    x: &Tensor,
    gate_up: &Tensor,
    down: &Tensor,
    routing: &CpuRouting,
) -> Result<Tensor, KernelError> {
    let op = "moe_experts";
    let x = View::<E>::new(op, x)?;
    let (tokens, hidden) = x.matrix()?;
    let (gate_up, down) = (View::<E>::new(op, gate_up)?, View::<E>::new(op, down)?);
    let &[count, double, _] = gate_up.dims() else {
        return Err(shape_error(op, format!("gate_up has shape {:?}", gate_up.dims())));
    };
    let inner = double / 2;
    gate_up.expect_shape("gate_up", &[count, 2 * inner, hidden])?;
    down.expect_shape("down", &[count, hidden, inner])?;
    if routing.experts.len() != tokens * routing.top_k || routing.expert_count != count {
        let what = format!("routing of {} over {} experts", routing.experts.len(), routing.expert_count);
        return Err(shape_error(op, format!("{what}, {tokens} tokens over {count}")));
    }
    let (source, gate_up, down) = (x.data()?, gate_up.data()?, down.data()?);
    let mut slots = vec![Vec::new(); count];
    for (slot, &expert) in routing.experts.iter().enumerate() {
        slots[expert as usize].push(slot);
    }
    // One row for each slot, in slot order.
    let mut results = vec![E::default(); routing.experts.len() * hidden];
    for (expert, slots) in slots.iter().enumerate().filter(|(_, slots)| !slots.is_empty()) {
        let rows: Vec<E> =
            slots.iter().flat_map(|slot| &source[slot / routing.top_k * hidden..][..hidden]).copied().collect();
        let w = &gate_up[expert * 2 * inner * hidden..][..2 * inner * hidden];
        let count = slots.len();
        let product = Product { x: &rows, w, rows: count, columns: 2 * inner, depth: hidden, bias: None };
        let gate_up_out: Vec<E> = matmul(host, product);
        let mut inside = vec![E::default(); slots.len() * inner];
        swiglu_rows(host, &gate_up_out, inner, &mut inside);
        let w = &down[expert * hidden * inner..][..hidden * inner];
        let product = Product { x: &inside, w, rows: count, columns: hidden, depth: inner, bias: None };
        let out: Vec<E> = matmul(host, product);
        for (slot, out) in slots.iter().zip(out.chunks_exact(hidden.max(1))) {
            results[slot * hidden..][..hidden].copy_from_slice(out);
        }
    }
    let mut out = vec![E::default(); tokens * hidden];
    for (token, out) in out.chunks_exact_mut(hidden.max(1)).enumerate() {
        let slots = token * routing.top_k..(token + 1) * routing.top_k;
        let mut sums = vec![0f32; hidden];
        for (slot, &weight) in slots.clone().zip(&routing.weights[slots]) {
            for (sum, value) in sums.iter_mut().zip(&results[slot * hidden..][..hidden]) {
                let product = weight * value.widen();
                *sum += if routing.f32_weights { product } else { E::round(product) };
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = E::narrow(sum);
        }
    }
    tensor(out, &[tokens, hidden])
}
