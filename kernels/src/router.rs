//! Which experts a token goes to: softmax and sigmoid routers.
//!
//! Ties go to the lowest expert index. Must not know how experts are run.

use candle_core::Tensor;

use crate::backend::SigmoidChoice;
use crate::error::KernelError;
use crate::host::Host;
use crate::matmul::{Product, matmul};
use crate::simd::Vectors;
use crate::simd::math::{exp, sigmoid as logistic};
use crate::view::{View, shape_error};

/// Experts and weights of each token on the CPU.
#[derive(Debug, Clone)]
pub struct CpuRouting {
    pub(crate) top_k: usize,
    /// `[T, top_k]`.
    pub(crate) experts: Vec<u32>,
    /// `[T, top_k]`.
    pub(crate) weights: Vec<f32>,
    /// First index that no expert has.
    pub(crate) expert_count: usize,
    /// Whether weights are f32 values beyond the model's dtype, so that products are not rounded.
    pub(crate) f32_weights: bool,
}

/// x gate^T as `O`, and the number of experts.
fn scores<E: Vectors, O: Vectors>(
    host: &Host,
    op: &'static str,
    x: &Tensor,
    gate: &Tensor,
    top_k: usize,
    convert: impl Fn(&[E]) -> Vec<O>,
) -> Result<(Vec<O>, usize), KernelError> {
    let (x, gate) = (View::<E>::new(op, x)?, View::<E>::new(op, gate)?);
    let ((rows, depth), (experts, gate_depth)) = (x.matrix()?, gate.matrix()?);
    if depth != gate_depth {
        return Err(shape_error(op, format!("x {:?} with gate {:?}", x.dims(), gate.dims())));
    }
    if top_k == 0 || top_k > experts {
        return Err(shape_error(op, format!("{top_k} of {experts} experts")));
    }
    let (x, w) = (convert(x.data()?), convert(gate.data()?));
    Ok((matmul(host, Product { x: &x, w: &w, rows, columns: experts, depth, bias: None }), experts))
}

/// Indices of the `count` largest scores, largest first, the lower index first among equals.
fn largest(scores: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

/// See [`crate::Backend::router_softmax`].
pub(crate) fn softmax<E: Vectors>(
    host: &Host,
    x: &Tensor,
    gate: &Tensor,
    top_k: usize,
    norm_topk: bool,
) -> Result<CpuRouting, KernelError> {
    let (logits, expert_count) = scores::<E, E>(host, "router_softmax", x, gate, top_k, <[E]>::to_vec)?;
    let mut routing = CpuRouting { top_k, experts: Vec::new(), weights: Vec::new(), expert_count, f32_weights: false };
    for row in logits.chunks_exact(expert_count) {
        let max = row.iter().map(|v| v.widen()).fold(f32::NEG_INFINITY, f32::max);
        let mut p: Vec<f32> = row.iter().map(|v| exp(v.widen() - max)).collect();
        let total: f32 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= total);
        let chosen = largest(&p, top_k);
        let sum: f32 = if norm_topk { chosen.iter().map(|&e| p[e as usize]).sum() } else { 1.0 };
        routing.weights.extend(chosen.iter().map(|&e| E::round(p[e as usize] / sum)));
        routing.experts.extend(chosen);
    }
    Ok(routing)
}

/// See [`crate::Backend::router_sigmoid`].
pub(crate) fn sigmoid<E: Vectors>(
    host: &Host,
    x: &Tensor,
    gate: &Tensor,
    bias: &Tensor,
    choice: SigmoidChoice,
) -> Result<CpuRouting, KernelError> {
    let op = "router_sigmoid";
    let SigmoidChoice { top_k, groups, top_groups, norm_topk, scale } = choice;
    let widen = |values: &[E]| values.iter().map(|v| v.widen()).collect();
    let (logits, expert_count) = scores::<E, f32>(host, op, x, gate, top_k, widen)?;
    if groups == 0 || expert_count % groups != 0 || !(1..=groups).contains(&top_groups) {
        return Err(shape_error(op, format!("{top_groups} of {groups} groups of {expert_count} experts")));
    }
    let group_size = expert_count / groups;
    if top_groups * group_size < top_k {
        return Err(shape_error(op, format!("{top_k} experts from {top_groups} groups of {group_size}")));
    }
    let bias = View::<f32>::new(op, bias)?;
    bias.expect_shape("bias", &[expert_count])?;
    let bias = bias.data()?;
    let mut routing = CpuRouting { top_k, experts: Vec::new(), weights: Vec::new(), expert_count, f32_weights: true };
    for row in logits.chunks_exact(expert_count) {
        let scores: Vec<f32> = row.iter().map(|&v| logistic(v)).collect();
        let mut biased: Vec<f32> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
        if top_groups < groups {
            let best_two = |group: &[f32]| largest(group, 2).iter().map(|&e| group[e as usize]).sum::<f32>();
            let group_scores: Vec<f32> = biased.chunks_exact(group_size).map(best_two).collect();
            let kept = largest(&group_scores, top_groups);
            for (index, group) in biased.chunks_exact_mut(group_size).enumerate() {
                if !kept.contains(&(index as u32)) {
                    group.fill(f32::NEG_INFINITY);
                }
            }
        }
        let chosen = largest(&biased, top_k);
        let sum: f32 = chosen.iter().map(|&e| scores[e as usize]).sum();
        let divisor = if norm_topk { sum + 1e-20 } else { 1.0 };
        routing.weights.extend(chosen.iter().map(|&e| scores[e as usize] / divisor * scale));
        routing.experts.extend(chosen);
    }
    Ok(routing)
}
