//! `qkv_norm_rope_cache_write` and `paged_attention` together, as a model uses them, against a reference over plain arrays.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use candle_core::{DType, Tensor};
use millrace_kernels::{Backend, CpuBackend, Ragged, RopeTable};
use support::{Random, assert_as_good_as, assert_refused, backends, bits, round};

/// Sizes of one layer.
#[derive(Clone, Copy)]
struct Layer {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    block_tokens: usize,
}

const LAYERS: [Layer; 5] = [
    Layer { heads: 4, kv_heads: 2, head_dim: 128, block_tokens: 16 },
    Layer { heads: 1, kv_heads: 1, head_dim: 2, block_tokens: 1 },
    Layer { heads: 6, kv_heads: 2, head_dim: 20, block_tokens: 5 },
    Layer { heads: 20, kv_heads: 1, head_dim: 64, block_tokens: 32 },
    Layer { heads: 3, kv_heads: 3, head_dim: 96, block_tokens: 600 },
];

impl Layer {
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn scale(&self) -> f32 {
        (self.head_dim as f32).powf(-0.5)
    }
}

/// One sequence's inputs for all of its tokens.
struct Sequence {
    qkv: Vec<f32>,
    tokens: usize,
}

struct Weights {
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Weights {
    fn random(random: &mut Random, dtype: DType, layer: Layer, positions: usize) -> Self {
        let half = layer.head_dim / 2;
        let angle = |i: usize| (i / half) as f32 * 0.3f32.powi((i % half) as i32 % 7);
        Self {
            q_norm: random.values(dtype, layer.head_dim),
            k_norm: random.values(dtype, layer.head_dim),
            cos: (0..positions * half).map(|i| round(dtype, angle(i).cos())).collect(),
            sin: (0..positions * half).map(|i| round(dtype, angle(i).sin())).collect(),
        }
    }
}

/// Part of one sequence's tokens to run in a step.
struct Part<'a> {
    sequence: &'a Sequence,
    from: usize,
    to: usize,
    blocks: Vec<u32>,
}

/// Runs one step over `parts`, as a model layer does; returns each row's output.
fn step(
    backend: &CpuBackend,
    layer: Layer,
    weights: &Weights,
    cache: &mut <CpuBackend as Backend>::KvCache,
    parts: &[Part<'_>],
) -> Tensor {
    let half = layer.head_dim / 2;
    let mut batch = Ragged { query_start: vec![0], ..Ragged::default() };
    let (mut qkv, mut cos, mut sin) = (Vec::new(), Vec::new(), Vec::new());
    for part in parts {
        qkv.extend_from_slice(&part.sequence.qkv[part.from * layer.width()..part.to * layer.width()]);
        cos.extend_from_slice(&weights.cos[part.from * half..part.to * half]);
        sin.extend_from_slice(&weights.sin[part.from * half..part.to * half]);
        batch.query_start.push(batch.query_start.last().unwrap() + (part.to - part.from) as u32);
        batch.context.push(part.to as u32);
        batch.blocks.push(part.blocks.clone());
    }
    let rows = qkv.len() / layer.width();
    let tensor = |values: &[f32], shape: &[usize]| backend.upload(values, shape).unwrap();
    let rope = RopeTable { cos: tensor(&cos, &[rows, half]), sin: tensor(&sin, &[rows, half]) };
    let q = backend
        .qkv_norm_rope_cache_write(
            &tensor(&qkv, &[rows, layer.width()]),
            &tensor(&weights.q_norm, &[layer.head_dim]),
            &tensor(&weights.k_norm, &[layer.head_dim]),
            1e-6,
            &rope,
            &batch,
            cache,
        )
        .unwrap();
    backend.paged_attention(&q, &batch, cache, layer.scale()).unwrap()
}

/// A pool whose every element is NaN until written.
fn poisoned(backend: &CpuBackend, layer: Layer, blocks: usize) -> <CpuBackend as Backend>::KvCache {
    let mut cache = backend.kv_cache(blocks, layer.block_tokens, layer.kv_heads, layer.head_dim).unwrap();
    cache.fill(f32::NAN);
    cache
}

/// Normalised and rotated head with the documented roundings (`rounded`), or in f64 after the two exact ones HF shares.
fn prepare(dtype: DType, head: &[f32], w: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
    let mean = head.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / head.len() as f64;
    let scale = (1.0 / (mean + 1e-6).sqrt()) as f32;
    let t: Vec<f32> = head.iter().zip(w).map(|(x, w)| round(dtype, w * round(dtype, x * scale))).collect();
    let half = head.len() / 2;
    (0..head.len())
        .map(|i| {
            let (c, s) = (cos[i % half], sin[i % half]);
            let other = if i < half { -t[i + half] } else { t[i - half] };
            round(dtype, round(dtype, t[i] * c) + round(dtype, other * s))
        })
        .collect()
}

/// Attention of all tokens of one sequence: (exact in f64, plain with f32 sums and rounded probabilities).
fn reference(dtype: DType, layer: Layer, weights: &Weights, sequence: &Sequence) -> (Vec<f64>, Vec<f32>) {
    let (d, half) = (layer.head_dim, layer.head_dim / 2);
    let head = |token: usize, index: usize| &sequence.qkv[token * layer.width() + index * d..][..d];
    let ready = |token: usize, index: usize, w: &[f32]| {
        prepare(
            dtype,
            head(token, index),
            w,
            &weights.cos[token * half..][..half],
            &weights.sin[token * half..][..half],
        )
    };
    let keys: Vec<Vec<Vec<f32>>> = (0..layer.kv_heads)
        .map(|h| (0..sequence.tokens).map(|t| ready(t, layer.heads + h, &weights.k_norm)).collect())
        .collect();
    let (mut exact, mut plain) = (Vec::new(), Vec::new());
    for token in 0..sequence.tokens {
        for h in 0..layer.heads {
            let kv = h / (layer.heads / layer.kv_heads);
            let q = ready(token, h, &weights.q_norm);
            let scores: Vec<f64> = keys[kv][..=token]
                .iter()
                .map(|k| {
                    k.iter().zip(&q).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() * f64::from(layer.scale())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = p.iter().sum();
            for i in 0..d {
                let value = |t: usize| head(t, layer.heads + layer.kv_heads + kv)[i];
                exact.push(p.iter().enumerate().map(|(t, p)| p * f64::from(value(t))).sum::<f64>() / total);
                let sum: f32 = p.iter().enumerate().map(|(t, &p)| round(dtype, p as f32) * value(t)).sum();
                plain.push(round(dtype, sum / total as f32));
            }
        }
    }
    (exact, plain)
}

fn sequence(random: &mut Random, dtype: DType, layer: Layer, tokens: usize) -> Sequence {
    Sequence { qkv: random.values(dtype, tokens * layer.width()), tokens }
}

#[test]
fn agrees_with_f64_over_shuffled_poisoned_pages() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (i, layer) in LAYERS.into_iter().enumerate() {
            // All lengths are judged as one: a short context has too few outputs to compare error sizes.
            let (mut ours, mut plain, mut exact) = (Vec::new(), Vec::new(), Vec::new());
            for tokens in [1, 2, 15, 16, 17, 33, 61] {
                let weights = Weights::random(&mut random, dtype, layer, tokens);
                let sequence = sequence(&mut random, dtype, layer, tokens);
                let blocks = tokens.div_ceil(layer.block_tokens);
                let mut cache = poisoned(&backend, layer, blocks + 3);
                let blocks = random.shuffled(blocks + 3)[..blocks].to_vec();
                let part = Part { sequence: &sequence, from: 0, to: tokens, blocks };
                let out = step(&backend, layer, &weights, &mut cache, &[part]);
                let (e, p) = reference(dtype, layer, &weights, &sequence);
                ours.extend(backend.to_host(&out).unwrap());
                exact.extend(e);
                plain.extend(p);
            }
            assert_as_good_as(&format!("{label}, layer {i}"), &ours, &plain, &exact);
        }
    }
}

/// Long enough that the running maximum moves between chunks of keys.
#[test]
fn long_context_agrees_with_f64() {
    let mut random = Random::fresh();
    let layer = Layer { heads: 2, kv_heads: 1, head_dim: 16, block_tokens: 16 };
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        let tokens = 1_100;
        let weights = Weights::random(&mut random, dtype, layer, tokens);
        let sequence = sequence(&mut random, dtype, layer, tokens);
        let blocks = random.shuffled(tokens.div_ceil(16));
        let mut cache = poisoned(&backend, layer, blocks.len());
        let part = Part { sequence: &sequence, from: 0, to: tokens, blocks };
        let out = step(&backend, layer, &weights, &mut cache, &[part]);
        let (exact, plain) = reference(dtype, layer, &weights, &sequence);
        assert_as_good_as(&label, &backend.to_host(&out).unwrap(), &plain, &exact);
    }
}

#[test]
fn chunked_equals_whole_and_blocks_may_lie_anywhere() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        for (i, layer) in LAYERS.into_iter().enumerate() {
            let tokens = 53;
            let weights = Weights::random(&mut random, backend.dtype(), layer, tokens);
            let sequence = sequence(&mut random, backend.dtype(), layer, tokens);
            let count = tokens.div_ceil(layer.block_tokens);
            let in_order: Vec<u32> = (0..count as u32).collect();
            let mut cache = poisoned(&backend, layer, count);
            let part = Part { sequence: &sequence, from: 0, to: tokens, blocks: in_order };
            let whole = bits(&backend, &step(&backend, layer, &weights, &mut cache, &[part]));
            for chunk in [1, 2, 7, 16, 52] {
                let blocks = random.shuffled(count + 2)[..count].to_vec();
                let mut cache = poisoned(&backend, layer, count + 2);
                let mut pieces = Vec::new();
                for from in (0..tokens).step_by(chunk) {
                    let part = Part { sequence: &sequence, from, to: tokens.min(from + chunk), blocks: blocks.clone() };
                    pieces.extend(bits(&backend, &step(&backend, layer, &weights, &mut cache, &[part])));
                }
                assert!(pieces == whole, "{label}, layer {i}: chunks of {chunk} over shuffled blocks differ");
            }
        }
    }
}

#[test]
fn batched_equals_single() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        for (i, layer) in LAYERS.into_iter().enumerate() {
            // A new prompt, a decode token, a sequence without rows in this step, and a chunk in the middle.
            let spans = [(0, 19), (40, 41), (9, 9), (13, 30)];
            let weights = Weights::random(&mut random, backend.dtype(), layer, 64);
            let sequences: Vec<_> = spans.iter().map(|_| sequence(&mut random, backend.dtype(), layer, 64)).collect();
            let per_sequence = 64usize.div_ceil(layer.block_tokens);
            let order = random.shuffled(per_sequence * spans.len());
            let blocks: Vec<_> = order.chunks_exact(per_sequence).map(<[u32]>::to_vec).collect();
            let run = |together: bool| {
                let mut cache = poisoned(&backend, layer, order.len());
                for (sequence, (&(from, _), blocks)) in sequences.iter().zip(spans.iter().zip(&blocks)) {
                    if from > 0 {
                        let part = Part { sequence, from: 0, to: from, blocks: blocks.clone() };
                        step(&backend, layer, &weights, &mut cache, &[part]);
                    }
                }
                let part = |i: usize| Part {
                    sequence: &sequences[i],
                    from: spans[i].0,
                    to: spans[i].1,
                    blocks: blocks[i].clone(),
                };
                let steps: Vec<Vec<Part<'_>>> = if together {
                    vec![(0..spans.len()).map(part).collect()]
                } else {
                    (0..spans.len()).map(|i| vec![part(i)]).collect()
                };
                steps
                    .iter()
                    .flat_map(|parts| bits(&backend, &step(&backend, layer, &weights, &mut cache, parts)))
                    .collect::<Vec<_>>()
            };
            assert!(run(true) == run(false), "{label}, layer {i}: batched differs from single");
        }
    }
}

#[test]
fn bad_batches_are_refused() {
    for (_, backend) in backends() {
        let cache = backend.kv_cache(2, 4, 1, 8).unwrap();
        let q = backend.upload(&[0.0; 24], &[3, 8]).unwrap();
        let good = Ragged { query_start: vec![0, 3], context: vec![5], blocks: vec![vec![1, 0]] };
        assert!(backend.paged_attention(&q, &good, &cache, 1.0).is_ok());
        let bad = [
            Ragged { query_start: vec![0, 2], ..good.clone() },
            Ragged { query_start: vec![1, 3], ..good.clone() },
            Ragged { query_start: vec![0, 3, 3], ..good.clone() },
            Ragged { context: vec![2], ..good.clone() },
            Ragged { context: vec![9], ..good.clone() },
            Ragged { blocks: vec![vec![1]], ..good.clone() },
            Ragged { blocks: vec![vec![0, 2]], ..good.clone() },
            Ragged { blocks: vec![], ..good.clone() },
        ];
        for batch in bad {
            assert_refused(backend.paged_attention(&q, &batch, &cache, 1.0), "paged_attention");
        }
        let wide = backend.upload(&[0.0; 27], &[3, 9]).unwrap();
        assert_refused(backend.paged_attention(&wide, &good, &cache, 1.0), "paged_attention");
        assert_refused(backend.kv_cache(2, 0, 1, 8), "kv_cache");
    }
    let f32 = CpuBackend::new(DType::F32).unwrap();
    let bf16 = CpuBackend::new(DType::BF16).unwrap();
    let cache = f32.kv_cache(2, 4, 1, 8).unwrap();
    let q = bf16.upload(&[0.0; 24], &[3, 8]).unwrap();
    let batch = Ragged { query_start: vec![0, 3], context: vec![5], blocks: vec![vec![1, 0]] };
    assert_refused(bf16.paged_attention(&q, &batch, &cache, 1.0), "paged_attention");
}
