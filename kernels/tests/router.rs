//! Routers against direct f64 code, ties and groups included.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use candle_core::{DType, Device, Tensor};
use millrace_kernels::{Backend, SigmoidChoice};
use support::{Random, assert_refused, backends, round};

fn logits(x: &[f32], gate: &[f32], depth: usize) -> Vec<Vec<f64>> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    x.chunks_exact(depth).map(|row| gate.chunks_exact(depth).map(|gate| dot(row, gate)).collect()).collect()
}

/// Every chosen score is at least every other one, up to `slack`.
fn assert_largest(label: &str, scores: &[f64], chosen: &[u32], slack: f64) {
    let smallest = chosen.iter().map(|&e| scores[e as usize]).fold(f64::INFINITY, f64::min);
    for (expert, score) in scores.iter().enumerate() {
        assert!(
            chosen.contains(&(expert as u32)) || *score <= smallest + slack,
            "{label}: {expert} left out of {chosen:?}"
        );
    }
    let mut unique = chosen.to_vec();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), chosen.len(), "{label}: an expert twice in {chosen:?}");
}

#[test]
fn softmax_router_agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (rows, experts, depth, top_k, norm_topk) in
            [(5, 128, 64, 8, true), (3, 7, 33, 1, false), (2, 4, 8, 4, true), (0, 4, 8, 2, true)]
        {
            let (x, gate) = (random.values(dtype, rows * depth), random.values(dtype, experts * depth));
            let gate: Vec<f32> = gate.iter().map(|v| round(dtype, v * 0.1)).collect();
            let routing = backend
                .router_softmax(
                    &backend.upload(&x, &[rows, depth]).unwrap(),
                    &backend.upload(&gate, &[experts, depth]).unwrap(),
                    top_k,
                    norm_topk,
                )
                .unwrap();
            let (chosen, weights) = backend.routing_to_host(&routing).unwrap();
            assert_eq!((chosen.len(), weights.len()), (rows * top_k, rows * top_k));
            let slack = if dtype == DType::BF16 { 0.02 } else { 1e-4 };
            for ((scores, chosen), weights) in
                logits(&x, &gate, depth).iter().zip(chosen.chunks_exact(top_k)).zip(weights.chunks_exact(top_k))
            {
                assert_largest(&label, scores, chosen, slack);
                let exp: Vec<f64> = scores.iter().map(|s| s.exp()).collect();
                let total: f64 =
                    if norm_topk { chosen.iter().map(|&e| exp[e as usize]).sum() } else { exp.iter().sum() };
                for (&expert, &weight) in chosen.iter().zip(weights) {
                    let exact = exp[expert as usize] / total;
                    assert!(
                        (f64::from(weight) - exact).abs() <= 2.0 * slack * exact,
                        "{label}: weight {weight}, exact {exact}"
                    );
                    assert_eq!(round(dtype, weight), weight, "{label}: weight not in the model's dtype");
                }
                assert!(weights.windows(2).all(|pair| pair[0] >= pair[1]), "{label}: {weights:?} not descending");
            }
        }
    }
}

#[test]
fn equal_scores_go_to_the_lowest_experts() {
    for (_, backend) in backends() {
        let x = backend.upload(&[1.0; 4], &[1, 4]).unwrap();
        let gate = backend.upload(&[0.5; 24], &[6, 4]).unwrap();
        let routing = backend.router_softmax(&x, &gate, 3, true).unwrap();
        assert_eq!(backend.routing_to_host(&routing).unwrap().0, [0, 1, 2]);
    }
}

#[test]
fn sigmoid_router_agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (experts, groups, top_groups, top_k, norm_topk) in
            [(64, 1, 1, 4, true), (16, 4, 2, 3, true), (8, 8, 3, 2, false)]
        {
            let (rows, depth) = (6, 48);
            let (x, gate) = (random.values(dtype, rows * depth), random.values(dtype, experts * depth));
            let gate: Vec<f32> = gate.iter().map(|v| round(dtype, v * 0.1)).collect();
            let bias = random.values(DType::F32, experts);
            let choice = SigmoidChoice { top_k, groups, top_groups, norm_topk, scale: 1.8 };
            let bias_tensor = backend.weight_f32(&Tensor::new(bias.as_slice(), &Device::Cpu).unwrap()).unwrap();
            let routing = backend
                .router_sigmoid(
                    &backend.upload(&x, &[rows, depth]).unwrap(),
                    &backend.upload(&gate, &[experts, depth]).unwrap(),
                    &bias_tensor,
                    choice,
                )
                .unwrap();
            let (chosen, weights) = backend.routing_to_host(&routing).unwrap();
            for ((logits, chosen), weights) in
                logits(&x, &gate, depth).iter().zip(chosen.chunks_exact(top_k)).zip(weights.chunks_exact(top_k))
            {
                let scores: Vec<f64> = logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
                let biased: Vec<f64> = scores.iter().zip(&bias).map(|(s, &b)| s + f64::from(b)).collect();
                let size = experts / groups;
                let group_score = |g: usize| {
                    let mut group = biased[g * size..(g + 1) * size].to_vec();
                    group.sort_by(|a, b| b.total_cmp(a));
                    group.iter().take(2).sum::<f64>()
                };
                let mut order: Vec<usize> = (0..groups).collect();
                order.sort_by(|&a, &b| group_score(b).total_cmp(&group_score(a)));
                let kept = &order[..top_groups];
                let limited: Vec<f64> = (0..experts)
                    .map(|e| if kept.contains(&(e / size)) { biased[e] } else { f64::NEG_INFINITY })
                    .collect();
                assert!(chosen.iter().all(|&e| limited[e as usize].is_finite()), "{label}: outside the best groups");
                assert_largest(&label, &limited, chosen, 1e-5);
                let total: f64 = chosen.iter().map(|&e| scores[e as usize]).sum();
                for (&expert, &weight) in chosen.iter().zip(weights) {
                    let exact = scores[expert as usize] / if norm_topk { total } else { 1.0 } * f64::from(1.8f32);
                    assert!((f64::from(weight) - exact).abs() < 1e-5, "{label}: weight {weight}, exact {exact}");
                }
            }
        }
    }
}

#[test]
fn bad_shapes_are_refused() {
    for (_, backend) in backends() {
        let tensor = |shape: &[usize]| backend.upload(&vec![0.0; shape.iter().product()], shape).unwrap();
        let (x, gate) = (tensor(&[2, 4]), tensor(&[6, 4]));
        let bias = |n: usize| backend.weight_f32(&Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap()).unwrap();
        assert_refused(backend.router_softmax(&x, &tensor(&[6, 5]), 2, true), "router_softmax");
        assert_refused(backend.router_softmax(&x, &gate, 0, true), "router_softmax");
        assert_refused(backend.router_softmax(&x, &gate, 7, true), "router_softmax");
        let good = SigmoidChoice { top_k: 2, groups: 3, top_groups: 1, norm_topk: true, scale: 1.0 };
        assert!(backend.router_sigmoid(&x, &gate, &bias(6), good).is_ok());
        assert_refused(backend.router_sigmoid(&x, &gate, &bias(5), good), "router_sigmoid");
        for bad in [
            SigmoidChoice { top_k: 7, ..good },
            SigmoidChoice { top_k: 3, ..good },
            SigmoidChoice { groups: 4, ..good },
            SigmoidChoice { groups: 0, ..good },
            SigmoidChoice { top_groups: 4, ..good },
            SigmoidChoice { top_groups: 0, ..good },
        ] {
            assert_refused(backend.router_sigmoid(&x, &gate, &bias(6), bad), "router_sigmoid");
        }
    }
}
