//! Recorded steps: a small decoder run step by step with and without recording gives the same bits, two steps under way give the
//! tokens of one, and a steady state allocates nothing. Skips, and says so, without a device.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

#[path = "support/device.rs"]
mod device;
mod support;

use candle_core::DType;
use device::{device, poison};
use millrace_kernels::{Backend, CudaBackend, Draw, KernelError, Ragged, Staged, StepInputs};
use support::Random;

const VOCAB: usize = 1003;
const HIDDEN: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const BLOCK_TOKENS: usize = 16;

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
    fn new(backend: B, seed: u64, layers: usize, blocks: usize) -> Self {
        let mut random = Random::from_seed(seed);
        let mut tensor = |rows: usize, columns: usize| {
            let scale = (columns as f32).powf(-0.5);
            let values: Vec<f32> = random.values(DType::BF16, rows * columns).iter().map(|v| v * scale).collect();
            let host = candle_core::Tensor::from_vec(values, &[rows, columns], &candle_core::Device::Cpu).unwrap();
            backend.weight(&host).unwrap()
        };
        let table = tensor(VOCAB, HIDDEN);
        let qkv = (0..layers).map(|_| tensor((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)).collect();
        let output = (0..layers).map(|_| tensor(HIDDEN, HEADS * DIM)).collect();
        let norm = backend.reshape(&tensor(1, HIDDEN), &[HIDDEN]).unwrap();
        let head_norm = backend.reshape(&tensor(1, DIM), &[DIM]).unwrap();
        let inverse: Vec<f32> = (0..DIM / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / DIM as f32)).collect();
        let frequencies = backend.frequencies(&inverse, &[0; DIM / 2], 8192).unwrap();
        let cache = || backend.kv_cache(blocks, BLOCK_TOKENS, KV_HEADS, DIM).unwrap();
        let caches = (0..layers).map(|_| cache()).collect();
        Self { table, norm, head_norm, qkv, output, frequencies, caches, backend }
    }

    /// Launches one step.
    fn launch(&mut self, inputs: StepInputs) -> B::Logits {
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
        b.step::<KernelError>(inputs, &mut forward).unwrap()
    }

    /// Logits and greedy draws of one step.
    fn step(&mut self, inputs: StepInputs) -> (Vec<f32>, Vec<Option<u32>>) {
        let logits = self.launch(inputs);
        let values = self.backend.logits_to_host(&logits).unwrap();
        let draws = vec![Draw::GREEDY; values.len() / VOCAB];
        let flight = self.backend.finish(Some((&logits, &draws))).unwrap();
        (values, self.backend.finished(flight).unwrap().drawn)
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

/// How many steps a test takes, and of what. Compute-sanitizer's racecheck sees the tests of a few steps alone: under it the
/// host memory of many recorded ones grows beyond what a machine has.
#[derive(Clone, Copy)]
struct Length {
    layers: usize,
    steps: usize,
    /// Sequences that live in a step, by turns; the last is the most.
    live: [usize; 4],
    /// Tokens in the cache before the first step, all zeros.
    before: usize,
}

/// Steps of 11 sequences are padded to 12; contexts grow past one tile of attention.
const MANY: Length = Length { layers: 3, steps: 70, live: [1, 4, 7, 11], before: 0 };
/// Every kernel and a padded size, each once plain, once recorded and then replayed; several blocks share a sequence's keys.
const FEW: Length = Length { layers: 1, steps: 4, live: [2, 9, 2, 9], before: 150 };

fn run(backend: CudaBackend, seed: u64, length: Length) -> Vec<(Vec<f32>, Vec<Option<u32>>)> {
    let Length { layers, steps, live, before } = length;
    let (sequences, again) = (live[3], steps.min(8));
    let width = (before + steps + again).div_ceil(BLOCK_TOKENS);
    let mut order = Random::from_seed(seed ^ 77).shuffled(sequences * width);
    let tables: Vec<Vec<u32>> = (0..sequences).map(|_| order.split_off(order.len() - width)).collect();
    let mut model = Model::new(backend, seed, layers, sequences * width);
    let mut random = Random::from_seed(seed ^ 99);
    let mut contexts = vec![before; sequences];
    let mut all = Vec::new();
    let mut allocations = 0;
    for step in 0..steps + again {
        // Batch sizes change, so that padded steps of several sizes come by.
        let live = live[step % live.len()];
        let ids: Vec<u32> = (0..live).map(|_| random.below(VOCAB) as u32).collect();
        all.push(model.step(decode(&contexts[..live], &tables[..live], &ids)));
        contexts[..live].iter_mut().for_each(|context| *context += 1);
        if step + 1 == steps {
            allocations = model.backend.allocations();
        }
    }
    assert_eq!(model.backend.allocations(), allocations, "a steady state allocates nothing");
    all
}

fn recorded_and_plain(length: Length) {
    let (Some(plain), Some(graphs)) = (device(false), device(true)) else { return };
    let seed = Random::fresh().next();
    let (plain, recorded) = (run(plain, seed, length), run(graphs, seed, length));
    for (step, (plain, recorded)) in plain.iter().zip(&recorded).enumerate() {
        for (row, winner) in recorded.0.chunks_exact(VOCAB).zip(&recorded.1) {
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(*winner, row.iter().position(|v| *v == best).map(|at| at as u32), "draws of step {step}");
        }
        // Padding changes the number of rows of a linear, and with it the algorithm; keys and values in the cache keep the
        // difference, so that later steps are close, not equal.
        let largest = plain.0.iter().zip(&recorded.0).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(plain.0.len() == recorded.0.len() && largest <= 0.1, "step {step}: logits differ by {largest}");
        let padded = recorded.0.len() == VOCAB * length.live[3];
        assert!(padded || step > 2 || plain.0 == recorded.0, "step {step}: other bits");
    }
}

#[test]
fn recorded_steps_give_the_same_bits() {
    recorded_and_plain(MANY);
}

#[test]
fn a_few_recorded_steps_give_the_same_bits() {
    recorded_and_plain(FEW);
}

#[test]
fn a_wider_table_needs_no_new_recording() {
    let (Some(plain), Some(graphs)) = (device(false), device(true)) else { return };
    let seed = Random::fresh().next();
    let width = 400;
    let tables: Vec<Vec<u32>> = (0..2).map(|n| Random::from_seed(seed ^ n).shuffled(width)).collect();
    let mut models = [plain, graphs].map(|backend| Model::new(backend, seed, 1, width));
    let mut allocations = None;
    for longest in [1, 17, 1024, 5 * 1024, 6000, 40] {
        let inputs = decode(&[longest, 9], &tables, &[5, 6]);
        let [plain, recorded] = models.each_mut().map(|model| model.step(inputs.clone()));
        assert!(plain == recorded, "{longest} tokens, seed {seed}");
        let now = models[1].backend.allocations();
        assert_eq!(*allocations.get_or_insert(now), now, "{longest} tokens");
    }
}

/// Answers of `sequences` by a model of `layers`, every one in most of `steps`, in another order each time. With `ahead` a step
/// is launched before the one before it has ended: tokens of that one are named by their rows, older ones are known.
fn answers(cuda: CudaBackend, seed: u64, [layers, sequences, steps]: [usize; 3], ahead: bool) -> Vec<Vec<u32>> {
    let width = (steps + 1).div_ceil(BLOCK_TOKENS);
    let tables: Vec<Vec<u32>> = (0..sequences).map(|n| (0..width).map(|b| (n * width + b) as u32).collect()).collect();
    let mut model = Model::new(cuda, seed, layers, sequences * width);
    poison(&model.backend, 16 << 20);
    let mut random = Random::from_seed(seed ^ 3);
    let mut answers: Vec<Vec<u32>> = (0..sequences).map(|n| vec![n as u32]).collect();
    let mut contexts = vec![0; sequences];
    // The step under way: its sequences in order of rows.
    let mut under_way = None;
    let mut allocations = 0;
    let land = |model: &Model<CudaBackend>, answers: &mut Vec<Vec<u32>>, flight| {
        let (flight, rows): (_, Vec<usize>) = flight;
        let finished = model.backend.finished(flight).unwrap();
        assert!(finished.times.unwrap().busy.as_nanos() > 0);
        assert_eq!(finished.drawn.len(), rows.len());
        rows.iter().zip(finished.drawn).for_each(|(sequence, token)| answers[*sequence].push(token.unwrap()));
    };
    for step in 0..steps {
        let live = sequences - step % 3;
        let rows = random.shuffled(sequences).into_iter().map(|n| n as usize).take(live).collect::<Vec<_>>();
        let before = under_way.as_ref().map_or(&[][..], |(_, rows): &(_, Vec<usize>)| rows.as_slice());
        let id = |sequence: &usize| match before.iter().position(|other| other == sequence) {
            Some(row) => StepInputs::drawn(row as u32),
            None => *answers[*sequence].last().unwrap(),
        };
        let ids: Vec<u32> = rows.iter().map(id).collect();
        let own: Vec<usize> = rows.iter().map(|sequence| contexts[*sequence]).collect();
        let blocks: Vec<Vec<u32>> = rows.iter().map(|sequence| tables[*sequence].clone()).collect();
        let logits = model.launch(decode(&own, &blocks, &ids));
        let draw = |sequence: &usize| Draw {
            uniform: ((sequence * 31 + contexts[*sequence] * 17) % 97) as f64 / 97.0,
            temperature: [0.0, 0.8][sequence % 2],
            ..Draw::GREEDY
        };
        let draws: Vec<Draw> = rows.iter().map(draw).collect();
        let flight = model.backend.finish(Some((&logits, &draws))).unwrap();
        rows.iter().for_each(|sequence| contexts[*sequence] += 1);
        under_way.replace((flight, rows)).into_iter().for_each(|flight| land(&model, &mut answers, flight));
        if !ahead {
            under_way.take().into_iter().for_each(|flight| land(&model, &mut answers, flight));
        }
        if step == steps / 2 {
            allocations = model.backend.allocations();
        }
    }
    assert_eq!(model.backend.allocations(), allocations, "a steady state allocates nothing");
    model.backend.synchronize().unwrap();
    assert!(under_way.as_ref().is_none_or(|(flight, _)| model.backend.has_finished(flight).unwrap()));
    under_way.take().into_iter().for_each(|flight| land(&model, &mut answers, flight));
    answers
}

fn waiting_and_ahead(sizes: [usize; 3]) {
    let seed = Random::fresh().next();
    for graphs in [false, true] {
        let (Some(waits), Some(ahead)) = (device(graphs), device(graphs)) else { return };
        let expected = answers(waits, seed, sizes, false);
        assert!(expected.iter().all(|answer| answer.len() > sizes[2] / 3));
        assert_eq!(answers(ahead, seed, sizes, true), expected, "graphs {graphs}, seed {seed}");
    }
}

#[test]
fn two_steps_under_way_give_the_tokens_of_one() {
    [3, 12].into_iter().for_each(|sequences| waiting_and_ahead([3, sequences, 90]));
}

#[test]
fn a_few_steps_two_under_way_give_the_tokens_of_one() {
    waiting_and_ahead([1, 3, 8]);
}

#[test]
fn ids_stand_for_draws_of_the_step_before() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    for (rows, width) in [(1, 8), (7, 250), (67, 256)] {
        let table = random.values(DType::BF16, VOCAB * width);
        let uploaded = cuda.upload(&table, &[VOCAB, width]).unwrap();
        let mut values = random.values(DType::BF16, rows * VOCAB);
        values[(rows - 1) * VOCAB + 5] = f32::NAN;
        let step = |ids: &[u32], forward: &mut dyn FnMut(&Staged<CudaBackend>)| {
            let tables = vec![vec![0]; ids.len()];
            poison(&cuda, 1 << 20);
            let run = &mut |staged: &Staged<CudaBackend>| {
                forward(staged);
                cuda.upload(&values[..ids.len() * VOCAB], &[ids.len(), VOCAB])
            };
            cuda.step::<KernelError>(decode(&vec![0; ids.len()], &tables, ids), run)
        };
        let logits = step(&vec![0; rows], &mut |_| ()).unwrap();
        let flight = cuda.finish(Some((&logits, &vec![Draw::GREEDY; rows]))).unwrap();
        // Known ids, and draws from the last row, which is no number, to the first.
        let ids: Vec<u32> =
            (0..rows).map(|n| if n % 5 == 3 { n as u32 } else { StepInputs::drawn((rows - 1 - n) as u32) }).collect();
        let mut rows_of = Vec::new();
        step(&ids, &mut |staged| rows_of = cuda.to_host(&cuda.embed(&uploaded, &staged.ids).unwrap()).unwrap())
            .unwrap();
        let drawn = cuda.finished(flight).unwrap().drawn;
        assert_eq!(drawn[rows - 1], None);
        for (n, got) in rows_of.chunks_exact(width).enumerate() {
            let id = if n % 5 == 3 { n } else { drawn[rows - 1 - n].unwrap_or(0) as usize };
            assert!(got == &table[id * width..][..width], "row {n} of {rows}");
        }
        // A row that was not drawn is refused on the host.
        let beyond = step(&[StepInputs::drawn(rows as u32)], &mut |_| ());
        assert!(matches!(beyond, Err(KernelError::Index { .. })));
    }
}
