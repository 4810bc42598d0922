//! `moe_experts` after both routers, against a direct implementation with the documented roundings and f64.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use candle_core::{DType, Device, Tensor};
use millrace_kernels::{Backend, CpuBackend, SigmoidChoice};
use support::{Random, assert_as_good_as, assert_refused, backends, bits, round};

struct Layer {
    experts: usize,
    hidden: usize,
    inner: usize,
    gate: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

impl Layer {
    fn random(random: &mut Random, dtype: DType, experts: usize, hidden: usize, inner: usize) -> Self {
        let mut scaled = |count: usize| {
            random.values(dtype, count).iter().map(|v| round(dtype, v * (hidden as f32).powf(-0.5))).collect::<Vec<_>>()
        };
        let (gate, gate_up) = (scaled(experts * hidden), scaled(experts * 2 * inner * hidden));
        Self { experts, hidden, inner, gate, gate_up, down: scaled(experts * hidden * inner) }
    }

    fn tensors(&self, backend: &CpuBackend) -> [Tensor; 3] {
        [
            backend.upload(&self.gate, &[self.experts, self.hidden]).unwrap(),
            backend.upload(&self.gate_up, &[self.experts, 2 * self.inner, self.hidden]).unwrap(),
            backend.upload(&self.down, &[self.experts, self.hidden, self.inner]).unwrap(),
        ]
    }

    /// One expert on one row; rounded to `dtype` at the documented points, or exact for `None`.
    fn expert(&self, dtype: Option<DType>, expert: usize, x: &[f32]) -> Vec<f64> {
        let r = |v: f64| dtype.map_or(v, |dtype| f64::from(round(dtype, v as f32)));
        let dot = |a: &[f64], w: &[f32]| a.iter().zip(w).map(|(a, &w)| a * f64::from(w)).sum::<f64>();
        let x: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        let rows = &self.gate_up[expert * 2 * self.inner * self.hidden..][..2 * self.inner * self.hidden];
        let projected: Vec<f64> = rows.chunks_exact(self.hidden).map(|w| r(dot(&x, w))).collect();
        let (gate, up) = projected.split_at(self.inner);
        let inside: Vec<f64> = gate.iter().zip(up).map(|(g, u)| r(r(g / (1.0 + (-g).exp())) * u)).collect();
        let rows = &self.down[expert * self.hidden * self.inner..][..self.hidden * self.inner];
        rows.chunks_exact(self.inner).map(|w| r(dot(&inside, w))).collect()
    }
}

#[test]
fn agrees_with_f64_for_both_kinds_of_weights() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (experts, hidden, inner, tokens, top_k) in [(8, 48, 24, 11, 3), (3, 17, 5, 1, 2), (16, 32, 16, 40, 1)] {
            let layer = Layer::random(&mut random, dtype, experts, hidden, inner);
            let [gate, gate_up, down] = layer.tensors(&backend);
            let x = random.values(dtype, tokens * hidden);
            let xs = backend.upload(&x, &[tokens, hidden]).unwrap();
            let bias = backend.weight_f32(&Tensor::zeros(experts, DType::F32, &Device::Cpu).unwrap()).unwrap();
            let choice = SigmoidChoice { top_k, groups: 1, top_groups: 1, norm_topk: true, scale: 1.8 };
            for f32_weights in [false, true] {
                let routing = if f32_weights {
                    backend.router_sigmoid(&xs, &gate, &bias, choice).unwrap()
                } else {
                    backend.router_softmax(&xs, &gate, top_k, true).unwrap()
                };
                let y = backend.moe_experts(&xs, &gate_up, &down, &routing).unwrap();
                assert_eq!(backend.shape(&y), [tokens, hidden]);
                let (chosen, weights) = backend.routing_to_host(&routing).unwrap();
                let (mut plain, mut exact) = (Vec::new(), Vec::new());
                for (token, x) in x.chunks_exact(hidden).enumerate() {
                    let (mut sum, mut exact_sum) = (vec![0f32; hidden], vec![0f64; hidden]);
                    for slot in token * top_k..(token + 1) * top_k {
                        let (expert, weight) = (chosen[slot] as usize, weights[slot]);
                        let rounded = layer.expert(Some(dtype), expert, x);
                        for (i, value) in rounded.iter().enumerate() {
                            let product = weight * *value as f32;
                            sum[i] += if f32_weights { product } else { round(dtype, product) };
                        }
                        for (sum, value) in exact_sum.iter_mut().zip(layer.expert(None, expert, x)) {
                            *sum += f64::from(weight) * value;
                        }
                    }
                    plain.extend(sum.iter().map(|&v| round(dtype, v)));
                    exact.extend(exact_sum);
                }
                let label = format!("{label}, {experts} experts, f32 weights: {f32_weights}");
                assert_as_good_as(&label, &backend.to_host(&y).unwrap(), &plain, &exact);
            }
        }
    }
}

#[test]
fn batched_equals_single() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let layer = Layer::random(&mut random, backend.dtype(), 6, 64, 40);
        let [gate, gate_up, down] = layer.tensors(&backend);
        let x = backend.upload(&random.values(backend.dtype(), 37 * 64), &[37, 64]).unwrap();
        let run = |x: &Tensor| {
            let routing = backend.router_softmax(x, &gate, 2, true).unwrap();
            bits(&backend, &backend.moe_experts(x, &gate_up, &down, &routing).unwrap())
        };
        let whole = run(&x);
        let alone: Vec<u32> = (0..37).flat_map(|row| run(&backend.gather_rows(&x, &vec![row]).unwrap())).collect();
        assert!(whole == alone, "{label}: batched differs from single");
        assert!(run(&backend.gather_rows(&x, &vec![]).unwrap()).is_empty());
    }
}

/// The stack may be larger than memory that was ever written: untouched experts are not read.
#[test]
fn untouched_experts_do_not_count() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let mut layer = Layer::random(&mut random, backend.dtype(), 4, 16, 8);
        let x = backend.upload(&random.values(backend.dtype(), 16), &[1, 16]).unwrap();
        let [gate, gate_up, down] = layer.tensors(&backend);
        let routing = backend.router_softmax(&x, &gate, 2, true).unwrap();
        let clean = bits(&backend, &backend.moe_experts(&x, &gate_up, &down, &routing).unwrap());
        let touched = backend.routing_to_host(&routing).unwrap().0;
        for expert in (0..4).filter(|expert| !touched.contains(&(*expert as u32))) {
            layer.gate_up[expert * 2 * 8 * 16..][..2 * 8 * 16].fill(f32::NAN);
            layer.down[expert * 16 * 8..][..16 * 8].fill(f32::NAN);
        }
        let [_, gate_up, down] = layer.tensors(&backend);
        assert!(bits(&backend, &backend.moe_experts(&x, &gate_up, &down, &routing).unwrap()) == clean, "{label}");
    }
}

#[test]
fn bad_shapes_are_refused() {
    for (_, backend) in backends() {
        let tensor = |shape: &[usize]| backend.upload(&vec![0.0; shape.iter().product()], shape).unwrap();
        let routing = backend.router_softmax(&tensor(&[2, 4]), &tensor(&[3, 4]), 2, true).unwrap();
        let run = |x: &[usize], gate_up: &[usize], down: &[usize]| {
            backend.moe_experts(&tensor(x), &tensor(gate_up), &tensor(down), &routing)
        };
        assert!(run(&[2, 4], &[3, 10, 4], &[3, 4, 5]).is_ok());
        assert_refused(run(&[3, 4], &[3, 10, 4], &[3, 4, 5]), "moe_experts");
        assert_refused(run(&[2, 4], &[2, 10, 4], &[2, 4, 5]), "moe_experts");
        assert_refused(run(&[2, 4], &[3, 11, 4], &[3, 4, 5]), "moe_experts");
        assert_refused(run(&[2, 4], &[3, 10, 4], &[3, 5, 4]), "moe_experts");
        assert_refused(run(&[2, 4], &[30, 4], &[3, 4, 5]), "moe_experts");
    }
}
