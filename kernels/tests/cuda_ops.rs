//! Every op on CUDA against its CPU twin: odd sizes, poisoned memory, the 2x rule. Skips, and says so, without a device.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

#[path = "support/device.rs"]
mod device;
mod support;
#[path = "cuda_ops/vision.rs"]
mod vision;

use candle_core::DType;
use device::{Op, compare, device, poison, staged};
use millrace_kernels::{Backend, CudaBackend, CudaLogits, Draw, GeluKind, Ragged};
use support::{Random, assert_refused};

const B: DType = DType::BF16;
const SIZES: [(usize, usize); 10] =
    [(1, 1), (3, 2), (1, 15), (5, 16), (2, 17), (7, 128), (31, 1000), (40, 1024), (3, 2560), (2, 33_000)];

struct Rows {
    shape: (usize, usize),
    x: Vec<f32>,
    y: Vec<f32>,
    w: Vec<f32>,
    b: Vec<f32>,
    which: Which,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Which {
    Rms,
    AddRms,
    Layer,
    AddLayer,
    Swiglu,
    Gelu(GeluKind),
    Add,
}

impl Op for Rows {
    fn run<D: Backend>(&self, d: &D) -> Vec<f32> {
        let (rows, width) = self.shape;
        let (x, y) = (d.upload(&self.x, &[rows, width]).unwrap(), d.upload(&self.y, &[rows, width]).unwrap());
        let (w, b) = (d.upload(&self.w, &[width]).unwrap(), d.upload(&self.b, &[width]).unwrap());
        let out = match self.which {
            Which::Rms => d.rms_norm(&x, &w, 1e-6),
            Which::AddRms => {
                let (sum, normed) = d.add_rms_norm(&x, &y, &w, 1e-6).unwrap();
                return [d.to_host(&sum).unwrap(), d.to_host(&normed).unwrap()].concat();
            }
            Which::Layer => d.layer_norm(&x, &w, &b, 1e-6),
            Which::AddLayer => {
                let (sum, normed) = d.add_layer_norm(&x, &y, &w, &b, 1e-6).unwrap();
                return [d.to_host(&sum).unwrap(), d.to_host(&normed).unwrap()].concat();
            }
            Which::Swiglu => d.swiglu(&x),
            Which::Gelu(kind) => d.gelu(&x, kind),
            Which::Add => d.add(&x, &y),
        };
        d.to_host(&out.unwrap()).unwrap()
    }
}

#[test]
fn norms_and_activations() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    let kinds = [
        Which::Rms,
        Which::AddRms,
        Which::Layer,
        Which::AddLayer,
        Which::Swiglu,
        Which::Gelu(GeluKind::Tanh),
        Which::Gelu(GeluKind::Erf),
        Which::Add,
    ];
    for which in kinds {
        for (rows, width) in SIZES {
            let width = if which == Which::Swiglu { 2 * width } else { width };
            let shift = if matches!(which, Which::Layer | Which::AddLayer) { 3.0 } else { 0.0 };
            let mut values = |count| random.values(B, count);
            let x = values(rows * width).iter().map(|v| support::round(B, v + shift)).collect();
            let (y, w, b) = (values(rows * width), values(width), values(width));
            compare(&format!("{which:?} {rows} x {width}"), &cuda, &Rows { shape: (rows, width), x, y, w, b, which });
        }
    }
    let none = cuda.upload(&[], &[0, 16]).unwrap();
    assert_eq!(cuda.shape(&cuda.swiglu(&none).unwrap()), [0, 8]);
    let w = cuda.upload(&[1.0; 16], &[16]).unwrap();
    assert_eq!(cuda.shape(&cuda.rms_norm(&none, &w, 1e-6).unwrap()), [0, 16]);
    assert_refused(cuda.rms_norm(&w, &none, 1e-6), "rms_norm");
}

struct Linear {
    sizes: [usize; 3],
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Op for Linear {
    fn run<D: Backend>(&self, d: &D) -> Vec<f32> {
        let [rows, inputs, outputs] = self.sizes;
        let (x, w) = (d.upload(&self.x, &[rows, inputs]).unwrap(), d.upload(&self.w, &[outputs, inputs]).unwrap());
        let bias = self.bias.as_ref().map(|bias| d.upload(bias, &[outputs]).unwrap());
        d.to_host(&d.linear(&x, &w, bias.as_ref()).unwrap()).unwrap()
    }
}

#[test]
fn linears() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    let shapes = [[1, 8, 8], [1, 256, 1000], [2, 512, 768], [5, 1, 3], [7, 13, 5], [15, 2560, 64], [16, 1024, 320]];
    let more = [[17, 640, 333], [33, 96, 4096], [129, 256, 511], [300, 128, 64], [4, 9728, 256], [3, 2048, 16]];
    // What the copy engine streams: one past its tiles of outputs and inputs, and inputs split over a cluster.
    let streamed =
        [[9, 8, 130], [1, 24, 65], [16, 24, 65], [12, 2560, 1], [10, 520, 2000], [13, 9728, 200], [16, 4104, 129]];
    for sizes in shapes.into_iter().chain(more).chain(streamed) {
        let [rows, inputs, outputs] = sizes;
        for biased in [false, true] {
            let scale = (inputs as f32).powf(-0.5);
            let w = random.values(B, outputs * inputs).iter().map(|v| support::round(B, v * scale)).collect();
            let bias = biased.then(|| random.values(B, outputs));
            let op = Linear { sizes, x: random.values(B, rows * inputs), w, bias };
            compare(&format!("{sizes:?} bias {biased}"), &cuda, &op);
        }
    }
    let (x, w) = (cuda.upload(&[], &[0, 8]).unwrap(), cuda.upload(&[0.0; 24], &[3, 8]).unwrap());
    assert_eq!(cuda.shape(&cuda.linear(&x, &w, None).unwrap()), [0, 3]);
    assert_refused(cuda.linear(&w, &cuda.upload(&[0.0; 7], &[1, 7]).unwrap(), None), "linear");
}

struct Gated {
    sizes: [usize; 3],
    x: Vec<f32>,
    w: Vec<f32>,
}

impl Op for Gated {
    fn run<D: Backend>(&self, d: &D) -> Vec<f32> {
        let [rows, inputs, outputs] = self.sizes;
        let x = d.upload(&self.x, &[rows, inputs]).unwrap();
        let w = d.upload(&self.w, &[2 * outputs, inputs]).unwrap();
        d.to_host(&d.linear_swiglu(&x, &w).unwrap()).unwrap()
    }
}

#[test]
fn gated_linears() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    let few = [[1, 8, 4], [1, 256, 1000], [7, 136, 48], [8, 2560, 333], [13, 512, 96], [16, 1024, 64], [40, 256, 100]];
    // From 1,024 rows on, whole tiles of 128 outputs take the fused kernel: depths that are no multiple of its 64, rows of its 256.
    let many = [[1024, 72, 128], [1025, 200, 256], [1337, 64, 384], [2900, 136, 128], [1100, 256, 100]];
    let streamed = [[9, 24, 65], [16, 2560, 130], [11, 9728, 63], [16, 8, 1]];
    for sizes in few.into_iter().chain(many).chain(streamed) {
        let [rows, inputs, outputs] = sizes;
        let scale = (inputs as f32).powf(-0.5);
        let w = random.values(B, 2 * outputs * inputs).iter().map(|v| support::round(B, v * scale)).collect();
        compare(&format!("{sizes:?}"), &cuda, &Gated { sizes, x: random.values(B, rows * inputs), w });
    }
}

/// Up to 16 rows on Hopper (elsewhere up to 8) the sums are taken in one order: a row's result is the same bits beside any others.
#[test]
fn a_row_of_a_linear_does_not_depend_on_how_many_there_are() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    for (inputs, outputs) in [(2560, 1000), (72, 130), (9728, 64)] {
        let (x, w) = (random.values(B, 16 * inputs), random.values(B, outputs * inputs));
        let w = cuda.upload(&w, &[outputs, inputs]).unwrap();
        let run = |rows: usize, gated: bool| {
            let x = cuda.upload(&x[..rows * inputs], &[rows, inputs]).unwrap();
            let out = if gated { cuda.linear_swiglu(&x, &w) } else { cuda.linear(&x, &w, None) };
            cuda.to_host(&out.unwrap()).unwrap()
        };
        for gated in [false, true] {
            let most = if cuda.description().ends_with(" 9.0") { 16 } else { 8 };
            let whole = run(most, gated);
            for rows in [1, 2, 5, 7, 9, 12, 15].into_iter().filter(|rows| *rows < most) {
                let part = run(rows, gated);
                assert_eq!(part, whole[..part.len()], "{rows} of {most} rows, {inputs} x {outputs}, gated {gated}");
            }
        }
    }
}

struct Moves {
    width: usize,
    x: Vec<f32>,
    values: Vec<f32>,
    rows: Vec<u32>,
}

impl Op for Moves {
    fn run<D: Backend>(&self, d: &D) -> Vec<f32> {
        let x = d.upload(&self.x, &[self.x.len() / self.width, self.width]).unwrap();
        let values = d.upload(&self.values, &[self.rows.len(), self.width]).unwrap();
        let rows = d.indices(self.rows.clone()).unwrap();
        let gathered = d.gather_rows(&x, &rows).unwrap();
        let outputs = [
            d.scatter_rows(&x, &rows, &values).unwrap(),
            d.scatter_add_rows(&x, &rows, &values).unwrap(),
            d.concat_rows(&[gathered.clone(), x.clone(), gathered]).unwrap(),
            d.row_range(&x, self.rows.len() / 3..self.rows.len() / 2).unwrap(),
            x,
        ];
        outputs.iter().flat_map(|out| d.to_host(out).unwrap()).collect()
    }
}

#[test]
fn rows_move() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    for (count, width) in [(1, 1), (5, 7), (17, 128), (300, 2560)] {
        let any: Vec<u32> = (0..count.min(40)).map(|_| random.below(count) as u32).collect();
        // Ascending rows are known to differ from each other, and take a shorter way.
        let mut ascending = any.clone();
        ascending.sort_unstable();
        ascending.dedup();
        for rows in [any, ascending] {
            let (x, values) = (random.values(B, count * width), random.values(B, rows.len() * width));
            compare(&format!("{count} x {width}"), &cuda, &Moves { width, x, values, rows });
        }
    }
    // Neighbours in one tensor are joined where they lie; all others are copied.
    for (rows, width) in [(7, 8), (6, 3)] {
        let values = random.values(B, rows * width);
        let x = cuda.upload(&values, &[rows, width]).unwrap();
        let part = |range| cuda.row_range(&x, range).unwrap();
        let held = |parts: &[_]| cuda.to_host(&cuda.concat_rows(parts).unwrap()).unwrap();
        assert_eq!(held(&[part(0..2), part(2..2), part(2..rows)]), values);
        assert_eq!(held(&[part(2..4), part(0..2)]), [&values[2 * width..4 * width], &values[..2 * width]].concat());
        assert_eq!(held(&[part(0..1), part(2..3)]), [&values[..width], &values[2 * width..3 * width]].concat());
    }
    let x = cuda.upload(&[0.0; 6], &[2, 3]).unwrap();
    assert_refused(cuda.gather_rows(&x, &cuda.indices(vec![0, 2]).unwrap()), "gather_rows");
    assert_refused(cuda.embed(&x, &cuda.indices(vec![u32::MAX]).unwrap()), "embed");
}

struct Attention {
    heads: [usize; 3],
    block_tokens: usize,
    blocks: usize,
    /// Two steps: what the second sees, the first has written.
    steps: Vec<(Ragged, Vec<[u32; 3]>, Vec<f32>)>,
    norms: [Vec<f32>; 2],
    inverse: Vec<f32>,
    axes: Vec<u32>,
}

impl Attention {
    fn new(random: &mut Random, heads: [usize; 3], block_tokens: usize, lengths: &[(usize, usize)]) -> Self {
        let [query, kv, d] = heads;
        let needed: Vec<usize> = lengths.iter().map(|(a, b)| (a + b).div_ceil(block_tokens)).collect();
        let blocks = needed.iter().sum::<usize>() + 3;
        let mut free = random.shuffled(blocks);
        let tables: Vec<Vec<u32>> = needed.iter().map(|n| free.split_off(free.len() - n)).collect();
        let mut steps = Vec::new();
        for second in [false, true] {
            let mut ragged = Ragged { query_start: vec![0], ..Ragged::default() };
            let mut positions = Vec::new();
            for (table, &(first, then)) in tables.iter().zip(lengths) {
                let (start, count) = if second { (first, then) } else { (0, first) };
                positions.extend((start..start + count).map(|t| [t as u32, (t / 3) as u32, (t % 7) as u32]));
                ragged.query_start.push(positions.len() as u32);
                ragged.context.push((start + count) as u32);
                ragged.blocks.push(table.clone());
            }
            let qkv = random.values(B, positions.len() * (query + 2 * kv) * d);
            steps.push((ragged, positions, qkv));
        }
        let inverse = (0..d / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / d as f32)).collect();
        let axes = (0..d / 2).map(|i| (i % 3) as u32).collect();
        let norms = [random.values(B, d), random.values(B, d)];
        Self { heads, block_tokens, blocks, steps, norms, inverse, axes }
    }
}

impl Op for Attention {
    fn run<D: Backend>(&self, b: &D) -> Vec<f32> {
        let [query, kv, d] = self.heads;
        let frequencies = b.frequencies(&self.inverse, &self.axes, 1000).unwrap();
        let [q_norm, k_norm] = [0, 1].map(|n| b.upload(&self.norms[n], &[d]).unwrap());
        let mut cache = b.kv_cache(self.blocks, self.block_tokens, kv, d).unwrap();
        let mut values = Vec::new();
        for (ragged, positions, qkv) in &self.steps {
            let rows = positions.len();
            values.extend(staged(b, ragged, positions.clone(), self.block_tokens, |staged| {
                let qkv = b.upload(qkv, &[rows, (query + 2 * kv) * d]).unwrap();
                let rope = b.rope_table(&frequencies, &staged.positions).unwrap();
                let q = b
                    .qkv_norm_rope_cache_write(&qkv, &q_norm, &k_norm, 1e-6, &rope, &staged.batch, &mut cache)
                    .unwrap();
                let out = b.paged_attention(&q, &staged.batch, &cache, (d as f32).powf(-0.5)).unwrap();
                [b.to_host(&q).unwrap(), b.to_host(&out).unwrap()].concat()
            }));
        }
        values
    }
}

#[test]
fn paged_attention_decodes_and_prefills() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    let decode: &[(usize, usize)] = &[(1, 1), (16, 1), (37, 1), (300, 1)];
    // So many tiles that each kv head has blocks of its own.
    let many: Vec<(usize, usize)> = (0..560).map(|_| (1 + random.below(90), 1)).collect();
    for heads in [[8, 8, 64], [8, 8, 128]] {
        let op = Attention::new(&mut random, heads, 16, &many);
        compare(&format!("{heads:?}, {} sequences", many.len()), &cuda, &op);
    }
    let mixed: &[(usize, usize)] = &[(5, 1), (33, 17), (1, 130), (64, 64)];
    for heads in [[4, 1, 128], [8, 2, 64], [32, 8, 128], [6, 6, 16], [5, 1, 10]] {
        for (lengths, block_tokens) in [(decode, 16), (mixed, 16), (mixed, 8), (decode, 64)] {
            let op = Attention::new(&mut random, heads, block_tokens, lengths);
            compare(&format!("{heads:?} blocks of {block_tokens}, {lengths:?}"), &cuda, &op);
        }
    }
}

/// Ends of the warpgroup kernel's tiles of 128 packed rows and 128 keys, for every packing, at once and as chunks behind a cache.
#[test]
fn chunks_of_every_length_attend() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    const LENGTHS: [usize; 9] = [1, 2, 63, 64, 65, 127, 128, 129, 300];
    for heads in [[2, 2, 128], [2, 1, 128], [4, 1, 128], [8, 1, 128], [2, 2, 64], [8, 1, 64]] {
        // Second steps of chunks behind 1, 128 and 257 tokens, in an order that is not that of their lengths.
        let behind =
            |shift: usize| LENGTHS.iter().enumerate().map(move |(n, then)| ([1, 128, 257][(n + shift) % 3], *then));
        let mut lengths: Vec<(usize, usize)> = behind(random.below(3)).collect();
        lengths.push((300, 1));
        let op = Attention::new(&mut random, heads, 16, &lengths);
        compare(&format!("{heads:?}, {lengths:?}"), &cuda, &op);
    }
}

/// `logits [rows, width]` as a step gives them.
fn logits(cuda: &CudaBackend, values: &[f32], rows: usize) -> CudaLogits {
    let ragged = Ragged { query_start: vec![0, rows as u32], context: vec![rows as u32], blocks: vec![vec![0; rows]] };
    let inputs = millrace_kernels::StepInputs {
        ids: vec![0; rows],
        positions: vec![[0; 3]; rows],
        ragged,
        block_tokens: 16,
        logit_rows: (0..rows as u32).collect(),
        replayable: false,
    };
    poison(cuda, 1 << 20);
    let forward = &mut |_: &_| cuda.upload(values, &[rows, values.len() / rows]);
    cuda.step::<millrace_kernels::KernelError>(inputs, forward).unwrap()
}

/// What the device draws.
fn draw(cuda: &CudaBackend, logits: &CudaLogits, draws: &[Draw]) -> Vec<Option<u32>> {
    cuda.finished(cuda.finish(Some((logits, draws))).unwrap()).unwrap().drawn
}

#[test]
fn greedy_draws_are_the_first_of_the_largest() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    for width in [1, 7, 1000, 4096, 151_936] {
        let rows = 5;
        let mut logits: Vec<f32> = random.values(B, rows * width).iter().map(|v| (v * 2.0).round() / 2.0).collect();
        logits[width * 3 + random.below(width)] = [f32::NAN, f32::INFINITY][random.below(2)];
        let mut expected: Vec<Option<u32>> = Vec::new();
        for row in logits.chunks_exact(width) {
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let first = row.iter().position(|v| *v == best).map(|at| at as u32);
            expected.push(first.filter(|_| row.iter().all(|v| v.is_finite())));
        }
        let drawn = self::logits(&cuda, &logits, rows);
        assert_eq!(draw(&cuda, &drawn, &[Draw::GREEDY; 5]), expected, "{width}");
    }
}

/// Candidates in order of id, and the sum of weights before each and with it, as shares: the rules of transformers in f64.
fn shares(row: &[f32], draw: &Draw) -> Vec<(u32, f64, f64)> {
    let scaled = |x: f32| f64::from(x) / f64::from(draw.temperature);
    let mut kept: Vec<(u32, f64)> = (0u32..).zip(row.iter().map(|x| scaled(*x))).collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let highest = kept[0].1;
    if draw.top_k > 0 && (draw.top_k as usize) < kept.len() {
        let threshold = kept[draw.top_k as usize - 1].1;
        kept.retain(|(_, x)| *x >= threshold);
    }
    if draw.top_p < 1.0 {
        let total: f64 = kept.iter().map(|(_, x)| (x - highest).exp()).sum();
        let mut tail = 0.0;
        while kept.len() > 1 {
            tail += (kept[kept.len() - 1].1 - highest).exp() / total;
            if tail > 1.0 - f64::from(draw.top_p) {
                break;
            }
            kept.pop();
        }
    }
    kept.retain(|(_, x)| (x - highest).exp() >= f64::from(draw.min_p));
    kept.sort_by_key(|(id, _)| *id);
    let total: f64 = kept.iter().map(|(_, x)| (x - highest).exp()).sum();
    let mut sum = 0.0;
    let share = |(id, x): (u32, f64)| {
        let before = sum;
        sum += (x - highest).exp() / total;
        (id, before, sum)
    };
    kept.into_iter().map(share).collect()
}

#[test]
fn random_draws_follow_the_filters() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    for (width, spread) in [(1, 1.0), (17, 1.0), (1000, 4.0), (4097, 0.2), (151_936, 2.5)] {
        for (top_k, top_p, min_p) in
            [(0, 1.0, 0.0), (20, 0.8, 0.0), (1, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (50, 0.5, 0.02)]
        {
            let rows = 7;
            let values: Vec<f32> =
                random.values(B, rows * width).iter().map(|v| support::round(B, v * spread)).collect();
            let draws: Vec<Draw> = (0..rows)
                .map(|n| {
                    let temperature = if n == 3 { 0.0 } else { 0.3 + random.uniform() };
                    Draw { uniform: f64::from(random.uniform()), temperature, top_p, min_p, top_k }
                })
                .collect();
            let drawn = draw(&cuda, &logits(&cuda, &values, rows), &draws);
            for ((row, draw), token) in values.chunks_exact(width).zip(&draws).zip(&drawn) {
                let token = token.unwrap();
                if draw.temperature == 0.0 {
                    let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert_eq!(row.iter().position(|v| *v == best), Some(token as usize));
                    continue;
                }
                // Shares of f32 weights: the boundary of top-p and the edges between tokens may move by about 1e-5.
                let near = [0.0, 2e-5, -2e-5].map(|shift| Draw { top_p: draw.top_p + shift, ..*draw });
                let near = near.map(|draw| if top_p < 1.0 { draw } else { Draw { top_p: 1.0, ..draw } });
                let fits = near.iter().any(|near| {
                    let found = shares(row, near).into_iter().find(|(id, _, _)| *id == token);
                    found.is_some_and(|(_, from, to)| from - 1e-5 <= draw.uniform && draw.uniform <= to + 1e-5)
                });
                assert!(fits, "{width} logits, {draw:?}: token {token}");
            }
        }
    }
}
