//! Recorded steps: a small decoder run step by step with and without recording gives the same bits, and a steady state
//! allocates nothing. Skips, and says so, without a device.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

#[path = "support/device.rs"]
mod device;
mod support;

use candle_core::DType;
use device::device;
use millrace_kernels::{Backend, CudaBackend, Draw, KernelError, Ragged, Staged, StepInputs};
use support::Random;

const VOCAB: usize = 1003;
const HIDDEN: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const BLOCK_TOKENS: usize = 16;
const LAYERS: usize = 3;

struct Model<B: Backend> {
    backend: B,
    table: B::Tensor,
    norm: B::Tensor,
    head_norm: B::Tensor,
    qkv: Vec<B::Tensor>,
    output: Vec<B::Tensor>,
    frequencies: B::Frequencies,
    caches: Vec<B::KvCache>,
}

impl<B: Backend> Model<B> {
    fn new(backend: B, seed: u64, blocks: usize) -> Self {
        let mut random = Random::from_seed(seed);
        let mut tensor = |rows: usize, columns: usize| {
            let scale = (columns as f32).powf(-0.5);
            let values: Vec<f32> = random.values(DType::BF16, rows * columns).iter().map(|v| v * scale).collect();
            let host = candle_core::Tensor::from_vec(values, &[rows, columns], &candle_core::Device::Cpu).unwrap();
            backend.weight(&host).unwrap()
        };
        let table = tensor(VOCAB, HIDDEN);
        let qkv = (0..LAYERS).map(|_| tensor((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)).collect();
        let output = (0..LAYERS).map(|_| tensor(HIDDEN, HEADS * DIM)).collect();
        let norm = backend.reshape(&tensor(1, HIDDEN), &[HIDDEN]).unwrap();
        let head_norm = backend.reshape(&tensor(1, DIM), &[DIM]).unwrap();
        let inverse: Vec<f32> = (0..DIM / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / DIM as f32)).collect();
        let frequencies = backend.frequencies(&inverse, &[0; DIM / 2], 1000).unwrap();
        let cache = || backend.kv_cache(blocks, BLOCK_TOKENS, KV_HEADS, DIM).unwrap();
        let caches = (0..LAYERS).map(|_| cache()).collect();
        Self { table, norm, head_norm, qkv, output, frequencies, caches, backend }
    }

    /// Logits and greedy draws of one step.
    fn step(&mut self, inputs: StepInputs) -> (Vec<f32>, Vec<Option<u32>>) {
        let Self { backend: b, table, norm, head_norm, qkv, output, frequencies, caches } = self;
        let mut forward = |staged: &Staged<B>| -> Result<B::Tensor, KernelError> {
            let mut x = b.embed(table, &staged.ids)?;
            let rope = b.rope_table(frequencies, &staged.positions)?;
            for ((qkv, output), cache) in qkv.iter().zip(output.iter()).zip(caches.iter_mut()) {
                let projected = b.linear(&b.rms_norm(&x, norm, 1e-6)?, qkv, None)?;
                let q =
                    b.qkv_norm_rope_cache_write(&projected, head_norm, head_norm, 1e-6, &rope, &staged.batch, cache)?;
                let attended = b.paged_attention(&q, &staged.batch, cache, 0.125)?;
                x = b.add(&x, &b.linear(&attended, output, None)?)?;
            }
            b.linear(&b.rms_norm(&b.gather_rows(&x, &staged.logit_rows)?, norm, 1e-6)?, table, None)
        };
        let logits = b.step::<KernelError>(inputs, &mut forward).unwrap();
        let values = b.logits_to_host(&logits).unwrap();
        let drawn = b.draw(&logits, &vec![Draw::GREEDY; values.len() / VOCAB]).unwrap().unwrap();
        (values, drawn)
    }
}

/// Inputs of the sequences that are live, each decoding one token after `context` ones.
fn decode(contexts: &[usize], tables: &[Vec<u32>], ids: &[u32]) -> StepInputs {
    let rows = contexts.len();
    let positions = contexts.iter().map(|context| [*context as u32; 3]).collect();
    let context = contexts.iter().map(|context| *context as u32 + 1).collect();
    let ragged = Ragged { query_start: (0..=rows as u32).collect(), context, blocks: tables.to_vec() };
    let (ids, logit_rows) = (ids.to_vec(), (0..rows as u32).collect());
    StepInputs { ids, positions, ragged, block_tokens: BLOCK_TOKENS, logit_rows, replayable: true }
}

fn run(backend: CudaBackend, seed: u64, sequences: usize, steps: usize) -> Vec<(Vec<f32>, Vec<Option<u32>>)> {
    let width = (steps + 1).div_ceil(BLOCK_TOKENS);
    let mut order = Random::from_seed(seed ^ 77).shuffled(sequences * width);
    let tables: Vec<Vec<u32>> = (0..sequences).map(|_| order.split_off(order.len() - width)).collect();
    let mut model = Model::new(backend, seed, sequences * width);
    let mut random = Random::from_seed(seed ^ 99);
    let mut contexts = vec![0; sequences];
    let mut all = Vec::new();
    for step in 0..steps {
        // Batch sizes change, so that padded steps of several sizes come by.
        let live = 1 + (sequences - 1) * (step % 4) / 3;
        let ids: Vec<u32> = (0..live).map(|_| random.below(VOCAB) as u32).collect();
        all.push(model.step(decode(&contexts[..live], &tables[..live], &ids)));
        contexts[..live].iter_mut().for_each(|context| *context += 1);
    }
    let allocations = model.backend.allocations();
    for step in 0..8 {
        let live = 1 + (sequences - 1) * (step % 4) / 3;
        let ids = vec![1; live];
        model.step(decode(&contexts[..live], &tables[..live], &ids));
    }
    assert_eq!(model.backend.allocations(), allocations, "a steady state allocates nothing");
    all
}

#[test]
fn recorded_steps_give_the_same_bits() {
    let (Some(plain), Some(graphs)) = (device(false), device(true)) else { return };
    let seed = Random::fresh().next();
    // Of 1, 4, 7, 11 sequences the last is padded to 12.
    let (plain, recorded) = (run(plain, seed, 11, 70), run(graphs, seed, 11, 70));
    for (step, (plain, recorded)) in plain.iter().zip(&recorded).enumerate() {
        for (row, winner) in recorded.0.chunks_exact(VOCAB).zip(&recorded.1) {
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(*winner, row.iter().position(|v| *v == best).map(|at| at as u32), "draws of step {step}");
        }
        // Padding changes the number of rows of a linear, and with it the algorithm; keys and values in the cache keep the
        // difference, so that later steps are close, not equal.
        let largest = plain.0.iter().zip(&recorded.0).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(plain.0.len() == recorded.0.len() && largest <= 0.1, "step {step}: logits differ by {largest}");
        assert!(step > 2 || plain.0 == recorded.0, "step {step}: other bits");
    }
}
