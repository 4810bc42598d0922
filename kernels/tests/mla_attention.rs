//! `mla_norm_rope_cache_write` and `mla_attention` together against the expanded form in f64.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use candle_core::{DType, Tensor};
use millrace_kernels::{Backend, CpuBackend, Ragged, RopeTable};
use support::{Random, assert_as_good_as, assert_refused, backends, bits, round};

type Cache = <CpuBackend as Backend>::KvCache;

#[derive(Clone, Copy)]
struct Layer {
    heads: usize,
    nope: usize,
    rope: usize,
    value: usize,
    latent: usize,
    block_tokens: usize,
}

const LAYERS: [Layer; 3] = [
    Layer { heads: 4, nope: 24, rope: 16, value: 32, latent: 64, block_tokens: 16 },
    Layer { heads: 11, nope: 6, rope: 2, value: 7, latent: 17, block_tokens: 5 },
    Layer { heads: 9, nope: 1, rope: 4, value: 3, latent: 9, block_tokens: 1 },
];

impl Layer {
    fn q_width(&self) -> usize {
        self.heads * (self.nope + self.rope)
    }

    fn scale(&self) -> f32 {
        ((self.nope + self.rope) as f32).powf(-0.5)
    }
}

/// One sequence and the layer's weights.
struct Inputs {
    tokens: usize,
    q: Vec<f32>,
    kv_a: Vec<f32>,
    kv_norm: Vec<f32>,
    kv_b: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Inputs {
    fn random(random: &mut Random, dtype: DType, layer: Layer, tokens: usize) -> Self {
        let angles: Vec<f32> = (0..tokens * layer.rope / 2).map(|_| random.uniform() * 6.3).collect();
        let kv_b = random.values(dtype, layer.heads * (layer.nope + layer.value) * layer.latent);
        Self {
            tokens,
            q: random.values(dtype, tokens * layer.q_width()),
            kv_a: random.values(dtype, tokens * (layer.latent + layer.rope)),
            kv_norm: random.values(dtype, layer.latent),
            kv_b: kv_b.iter().map(|v| round(dtype, v * (layer.latent as f32).powf(-0.5))).collect(),
            cos: angles.iter().map(|a| round(dtype, a.cos())).collect(),
            sin: angles.iter().map(|a| round(dtype, a.sin())).collect(),
        }
    }

    /// Tokens `from..to` of this sequence in one step.
    fn step(
        &self,
        backend: &CpuBackend,
        layer: Layer,
        cache: &mut Cache,
        from: usize,
        to: usize,
        blocks: &[u32],
    ) -> Tensor {
        let rows = to - from;
        let part =
            |values: &[f32], width: usize| backend.upload(&values[from * width..to * width], &[rows, width]).unwrap();
        let rope = RopeTable { cos: part(&self.cos, layer.rope / 2), sin: part(&self.sin, layer.rope / 2) };
        let batch =
            Ragged { query_start: vec![0, rows as u32], context: vec![to as u32], blocks: vec![blocks.to_vec()] };
        let norm = backend.upload(&self.kv_norm, &[layer.latent]).unwrap();
        let (q, kv_a) = (part(&self.q, layer.q_width()), part(&self.kv_a, layer.latent + layer.rope));
        let q = backend.mla_norm_rope_cache_write(&q, &kv_a, &norm, 1e-6, layer.heads, &rope, &batch, cache).unwrap();
        let kv_b = backend.upload(&self.kv_b, &[layer.heads * (layer.nope + layer.value), layer.latent]).unwrap();
        backend.mla_attention(&q, &kv_b, layer.heads, &batch, cache, layer.scale()).unwrap()
    }

    fn rotated(&self, dtype: DType, layer: Layer, token: usize, x: &[f32]) -> Vec<f32> {
        let half = layer.rope / 2;
        let angle = |i: usize| (self.cos[token * half + i], self.sin[token * half + i]);
        let r = |v: f32| round(dtype, v);
        let low = (0..half).map(|i| r(r(x[2 * i] * angle(i).0) + r(-x[2 * i + 1] * angle(i).1)));
        let high = (0..half).map(|i| r(r(x[2 * i + 1] * angle(i).0) + r(x[2 * i] * angle(i).1)));
        low.chain(high).collect()
    }

    /// Attention of every token, unrounded in f64 (exact) and plain in `dtype`: expanded, with rounded keys and values, and absorbed,
    /// with rounded queries and mixed latents.
    fn reference(&self, dtype: DType, layer: Layer) -> Reference {
        let mut latents = Vec::new();
        let mut k_rope = Vec::new();
        for (t, row) in self.kv_a.chunks_exact(layer.latent + layer.rope).enumerate() {
            let (c, r) = row.split_at(layer.latent);
            let mean = c.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / layer.latent as f64;
            let scale = (1.0 / (mean + 1e-6).sqrt()) as f32;
            latents.push(
                c.iter().zip(&self.kv_norm).map(|(c, w)| round(dtype, w * round(dtype, c * scale))).collect::<Vec<_>>(),
            );
            k_rope.push(self.rotated(dtype, layer, t, r));
        }
        let width = layer.nope + layer.value;
        let expand = |t: usize, row: usize| -> f64 {
            let w = &self.kv_b[row * layer.latent..][..layer.latent];
            latents[t].iter().zip(w).map(|(&c, &w)| f64::from(c) * f64::from(w)).sum()
        };
        let round = |v: f64| f64::from(round(dtype, v as f32));
        let mut out = Reference { exact: Vec::new(), expanded: Vec::new(), absorbed: Vec::new() };
        for token in 0..self.tokens {
            for head in 0..layer.heads {
                let q =
                    &self.q[token * layer.q_width() + head * (layer.nope + layer.rope)..][..layer.nope + layer.rope];
                let (q_nope, q_rope) = q.split_at(layer.nope);
                let q_rope = self.rotated(dtype, layer, token, q_rope);
                let rotated = |t: usize| -> f64 { dot(&q_rope, k_rope[t].iter().map(|&k| f64::from(k))) };
                let key = |t: usize, i: usize| expand(t, head * width + i);
                let value = |t: usize, i: usize| expand(t, head * width + layer.nope + i);
                let weights = |score: &dyn Fn(usize) -> f64| softmax(token, f64::from(layer.scale()), score);

                let p = weights(&|t| dot(q_nope, (0..layer.nope).map(|i| key(t, i))) + rotated(t));
                let mixed =
                    |i: usize| p.iter().enumerate().map(|(t, p)| p * value(t, i)).sum::<f64>() / p.iter().sum::<f64>();
                out.exact.extend((0..layer.value).map(mixed));

                let p = weights(&|t| dot(q_nope, (0..layer.nope).map(|i| round(key(t, i)))) + rotated(t));
                let total: f64 = p.iter().sum();
                let sum = |i: usize| p.iter().enumerate().map(|(t, &p)| round(p) * round(value(t, i))).sum::<f64>();
                out.expanded.extend((0..layer.value).map(|i| round(sum(i) / total) as f32));

                let w = |row: usize, c: usize| f64::from(self.kv_b[(head * width + row) * layer.latent + c]);
                let inside = |c: usize| round(q_nope.iter().enumerate().map(|(i, &q)| f64::from(q) * w(i, c)).sum());
                let query: Vec<f32> = (0..layer.latent).map(|c| inside(c) as f32).collect();
                let p = weights(&|t| dot(&query, latents[t].iter().map(|&c| f64::from(c))) + rotated(t));
                let total: f64 = p.iter().sum();
                let latent =
                    |c: usize| p.iter().enumerate().map(|(t, &p)| round(p) * f64::from(latents[t][c])).sum::<f64>();
                let mixed: Vec<f64> = (0..layer.latent).map(|c| round(latent(c) / total)).collect();
                let project = |i: usize| mixed.iter().enumerate().map(|(c, z)| z * w(layer.nope + i, c)).sum();
                out.absorbed.extend((0..layer.value).map(|i| round(project(i)) as f32));
            }
        }
        out
    }
}

/// What every token attends to, `[T, heads value]`.
struct Reference {
    exact: Vec<f64>,
    expanded: Vec<f32>,
    absorbed: Vec<f32>,
}

fn dot(a: &[f32], b: impl Iterator<Item = f64>) -> f64 {
    a.iter().zip(b).map(|(&a, b)| f64::from(a) * b).sum()
}

/// Unnormalised weights of tokens 0 to `last`, the largest 1.
fn softmax(last: usize, scale: f64, score: &dyn Fn(usize) -> f64) -> Vec<f64> {
    let scores: Vec<f64> = (0..=last).map(|t| score(t) * scale).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    scores.iter().map(|s| (s - max).exp()).collect()
}

fn poisoned(backend: &CpuBackend, layer: Layer, blocks: usize) -> Cache {
    let mut cache = backend.mla_cache(blocks, layer.block_tokens, layer.latent, layer.rope).unwrap();
    cache.fill(f32::NAN);
    cache
}

#[test]
fn both_forms_agree_with_f64_over_shuffled_poisoned_pages() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        for (i, layer) in LAYERS.into_iter().enumerate() {
            let tokens = 37;
            let inputs = Inputs::random(&mut random, backend.dtype(), layer, tokens);
            let reference = inputs.reference(backend.dtype(), layer);
            let count = tokens.div_ceil(layer.block_tokens);
            for (form, plain, chunk) in
                [("expanded", &reference.expanded, tokens), ("absorbed", &reference.absorbed, 1)]
            {
                let blocks = &random.shuffled(count + 2)[..count];
                let mut cache = poisoned(&backend, layer, count + 2);
                let mut ours = Vec::new();
                for from in (0..tokens).step_by(chunk) {
                    let y = inputs.step(&backend, layer, &mut cache, from, from + chunk, blocks);
                    assert_eq!(backend.shape(&y), [chunk, layer.heads * layer.value]);
                    ours.extend(backend.to_host(&y).unwrap());
                }
                assert_as_good_as(&format!("{label}, layer {i}, {form}"), &ours, plain, &reference.exact);
            }
        }
    }
}

#[test]
fn chunked_equals_whole_and_blocks_may_lie_anywhere() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        for (i, layer) in LAYERS.into_iter().enumerate() {
            let tokens = 42;
            let inputs = Inputs::random(&mut random, backend.dtype(), layer, tokens);
            let count = tokens.div_ceil(layer.block_tokens);
            let in_order: Vec<u32> = (0..count as u32).collect();
            let mut cache = poisoned(&backend, layer, count);
            let whole = bits(&backend, &inputs.step(&backend, layer, &mut cache, 0, tokens, &in_order));
            for chunk in [2, 6, 14, 21] {
                let blocks = &random.shuffled(count + 2)[..count];
                let mut cache = poisoned(&backend, layer, count + 2);
                let pieces: Vec<u32> = (0..tokens)
                    .step_by(chunk)
                    .flat_map(|from| {
                        bits(&backend, &inputs.step(&backend, layer, &mut cache, from, from + chunk, blocks))
                    })
                    .collect();
                assert!(pieces == whole, "{label}, layer {i}: chunks of {chunk} differ");
            }
        }
    }
}

#[test]
fn batched_equals_single() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        for (i, layer) in LAYERS.into_iter().enumerate() {
            let inputs = Inputs::random(&mut random, backend.dtype(), layer, 30);
            let per = 30usize.div_ceil(layer.block_tokens);
            let order = random.shuffled(3 * per);
            let tables: Vec<Vec<u32>> = order.chunks_exact(per).map(<[u32]>::to_vec).collect();
            // Three sequences with the same inputs: a prompt, and two decode steps at different lengths.
            let spans = [(0usize, 13usize), (20, 21), (7, 8)];
            let mut cache = poisoned(&backend, layer, 3 * per);
            let mut alone = Vec::new();
            for ((from, to), blocks) in spans.into_iter().zip(&tables) {
                if from > 0 {
                    inputs.step(&backend, layer, &mut cache, 0, from, blocks);
                }
                alone.extend(bits(&backend, &inputs.step(&backend, layer, &mut cache, from, to, blocks)));
            }
            let rows = |values: &[f32], width: usize| -> Tensor {
                let part: Vec<f32> =
                    spans.iter().flat_map(|&(from, to)| values[from * width..to * width].to_vec()).collect();
                backend.upload(&part, &[part.len() / width, width]).unwrap()
            };
            let batch = Ragged {
                query_start: vec![0, 13, 14, 15],
                context: spans.iter().map(|span| span.1 as u32).collect(),
                blocks: tables.clone(),
            };
            let rope = RopeTable { cos: rows(&inputs.cos, layer.rope / 2), sin: rows(&inputs.sin, layer.rope / 2) };
            let norm = backend.upload(&inputs.kv_norm, &[layer.latent]).unwrap();
            let (q, kv_a) = (rows(&inputs.q, layer.q_width()), rows(&inputs.kv_a, layer.latent + layer.rope));
            let q = backend
                .mla_norm_rope_cache_write(&q, &kv_a, &norm, 1e-6, layer.heads, &rope, &batch, &mut cache)
                .unwrap();
            let kv_b = backend.upload(&inputs.kv_b, &[layer.heads * (layer.nope + layer.value), layer.latent]).unwrap();
            let y = backend.mla_attention(&q, &kv_b, layer.heads, &batch, &cache, layer.scale()).unwrap();
            assert!(bits(&backend, &y) == alone, "{label}, layer {i}: batched differs from single");
        }
    }
}

#[test]
fn bad_shapes_are_refused() {
    for (_, backend) in backends() {
        let tensor = |shape: &[usize]| backend.upload(&vec![0.5; shape.iter().product()], shape).unwrap();
        let batch = Ragged { query_start: vec![0, 2], context: vec![2], blocks: vec![vec![0]] };
        let write = |q: &[usize], kv_a: &[usize], norm: usize, heads: usize, rope: usize| {
            let mut cache = backend.mla_cache(1, 4, 6, 4).unwrap();
            let rope = RopeTable { cos: tensor(&[2, rope]), sin: tensor(&[2, rope]) };
            let [q, kv_a, norm] = [tensor(q), tensor(kv_a), tensor(&[norm])];
            backend.mla_norm_rope_cache_write(&q, &kv_a, &norm, 1e-6, heads, &rope, &batch, &mut cache)
        };
        let op = "mla_norm_rope_cache_write";
        assert!(write(&[2, 14], &[2, 10], 6, 2, 2).is_ok());
        assert_refused(write(&[2, 13], &[2, 10], 6, 2, 2), op);
        assert_refused(write(&[2, 6], &[2, 10], 6, 2, 2), op);
        assert_refused(write(&[2, 14], &[2, 10], 6, 0, 2), op);
        assert_refused(write(&[2, 14], &[2, 9], 6, 2, 2), op);
        assert_refused(write(&[2, 14], &[2, 10], 5, 2, 2), op);
        assert_refused(write(&[2, 14], &[2, 10], 6, 2, 1), op);
        let cache = backend.mla_cache(1, 4, 6, 4).unwrap();
        let attention = |q: &[usize], kv_b: &[usize], heads: usize| {
            backend.mla_attention(&tensor(q), &tensor(kv_b), heads, &batch, &cache, 1.0)
        };
        let op = "mla_attention";
        assert!(attention(&[2, 14], &[16, 6], 2).is_ok());
        assert_refused(attention(&[2, 14], &[16, 5], 2), op);
        assert_refused(attention(&[2, 14], &[6, 6], 2), op);
        assert_refused(attention(&[2, 14], &[15, 6], 2), op);
        assert_refused(attention(&[3, 14], &[16, 6], 2), op);
        assert_refused(attention(&[2, 6], &[16, 6], 2), op);
        // A pool of latents is not one of keys and values.
        assert_refused(backend.paged_attention(&tensor(&[2, 10]), &batch, &cache, 1.0), "paged_attention");
    }
}
