//! The queries that `qkv_norm_rope_cache_write` returns, bit by bit against the documented roundings.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use candle_core::DType;
use millrace_kernels::{Backend, CpuBackend, Ragged, RopeTable};
use support::{Random, assert_refused, backends, round};

fn norm(dtype: DType, head: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mean = head.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / head.len() as f64;
    let scale = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    head.iter().zip(w).map(|(x, w)| round(dtype, w * round(dtype, x * scale))).collect()
}

fn rotate(dtype: DType, x: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
    let half = x.len() / 2;
    let product = |a: f32, b: f32| round(dtype, a * b);
    let low = (0..half).map(|i| round(dtype, product(x[i], cos[i]) + product(-x[half + i], sin[i])));
    let high = (0..half).map(|i| round(dtype, product(x[half + i], cos[i]) + product(x[i], sin[i])));
    low.chain(high).collect()
}

#[test]
fn queries_have_the_documented_roundings() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (heads, kv_heads, d, tokens) in [(2, 1, 128, 37), (3, 2, 10, 5), (1, 1, 2, 1), (16, 8, 64, 130)] {
            let width = (heads + 2 * kv_heads) * d;
            let qkv = random.values(dtype, tokens * width);
            let (q_norm, k_norm) = (random.values(dtype, d), random.values(dtype, d));
            let angles: Vec<f32> = (0..tokens * d / 2).map(|_| random.uniform() * 6.3).collect();
            let cos: Vec<f32> = angles.iter().map(|a| round(dtype, a.cos())).collect();
            let sin: Vec<f32> = angles.iter().map(|a| round(dtype, a.sin())).collect();
            let tensor = |values: &[f32], shape: &[usize]| backend.upload(values, shape).unwrap();
            let rope = RopeTable { cos: tensor(&cos, &[tokens, d / 2]), sin: tensor(&sin, &[tokens, d / 2]) };
            let blocks = tokens.div_ceil(8);
            let batch = Ragged {
                query_start: vec![0, tokens as u32],
                context: vec![tokens as u32],
                blocks: vec![random.shuffled(blocks)],
            };
            let mut cache = backend.kv_cache(blocks, 8, kv_heads, d).unwrap();
            let q = backend
                .qkv_norm_rope_cache_write(
                    &tensor(&qkv, &[tokens, width]),
                    &tensor(&q_norm, &[d]),
                    &tensor(&k_norm, &[d]),
                    1e-6,
                    &rope,
                    &batch,
                    &mut cache,
                )
                .unwrap();
            assert_eq!(backend.shape(&q), [tokens, heads * d]);
            let mut expected = Vec::new();
            for (token, row) in qkv.chunks_exact(width).enumerate() {
                let angles = token * d / 2..(token + 1) * d / 2;
                for head in row[..heads * d].chunks_exact(d) {
                    let normed = norm(dtype, head, &q_norm, 1e-6);
                    expected.extend(rotate(dtype, &normed, &cos[angles.clone()], &sin[angles.clone()]));
                }
            }
            let q = backend.to_host(&q).unwrap();
            let (unit, rounded) = if dtype == DType::BF16 { (0.016, "bf16") } else { (2e-6, "f32") };
            let far = q.iter().zip(&expected).filter(|(a, b)| (**a - **b).abs() > unit * b.abs().max(1.0)).count();
            assert_eq!(far, 0, "{label}: {far} of {} are more than a {rounded} step away", q.len());
            if dtype == DType::BF16 {
                // The mean's last f32 bit may turn a rounding; a missing rounding point changes about a tenth.
                let differ = q.iter().zip(&expected).filter(|(a, b)| a != b).count();
                assert!(differ * 100 <= q.len() + 200, "{label}: {differ} of {} differ", q.len());
            }
        }
    }
}

#[test]
fn bad_shapes_are_refused() {
    for (_, backend) in backends() {
        let op = "qkv_norm_rope_cache_write";
        let tensor = |shape: &[usize]| backend.upload(&vec![1.0; shape.iter().product()], shape).unwrap();
        let batch = Ragged { query_start: vec![0, 2], context: vec![2], blocks: vec![vec![0]] };
        let run = |qkv: &[usize], norm: usize, rope: &[usize], batch: &Ragged, backend: &CpuBackend| {
            let mut cache = backend.kv_cache(1, 4, 1, 8).unwrap();
            let rope = RopeTable { cos: tensor(rope), sin: tensor(rope) };
            backend.qkv_norm_rope_cache_write(
                &tensor(qkv),
                &tensor(&[norm]),
                &tensor(&[8]),
                1e-6,
                &rope,
                batch,
                &mut cache,
            )
        };
        assert!(run(&[2, 24], 8, &[2, 4], &batch, &backend).is_ok());
        assert_refused(run(&[2, 16], 8, &[2, 4], &batch, &backend), op);
        assert_refused(run(&[2, 25], 8, &[2, 4], &batch, &backend), op);
        assert_refused(run(&[2, 24], 7, &[2, 4], &batch, &backend), op);
        assert_refused(run(&[2, 24], 8, &[2, 8], &batch, &backend), op);
        assert_refused(run(&[2, 24], 8, &[1, 4], &batch, &backend), op);
        let outside = Ragged { blocks: vec![vec![1]], ..batch.clone() };
        assert_refused(run(&[2, 24], 8, &[2, 4], &outside, &backend), op);
    }
}
