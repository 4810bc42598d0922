//! Device memory of the official sizes, counted without a device: what the largest step needs, that what comes later fits into
//! it, and what is said where it does not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.
#![allow(clippy::print_stdout)] // The counts are the result.

mod counting;
mod models;

use bytes::Bytes;
use counting::Counting;
use millrace_executor::engine::Engine;
use millrace_executor::{Dtype, ExecutorError, KvBudget, LoadOptions, MediaSource, StepEngine};
use millrace_kernels::MemoryKind;
use millrace_protocol::plan::{OpenSlot, SlotWork, StepPlan};
use millrace_protocol::ready::MediaItem;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ActorId, BlockId, JobError, JobId, ModelName, PageDtype, PageRef, SlotId};

/// An H100's memory, less what a context takes.
const DEVICE_BYTES: u64 = 78 << 30;
/// The bar of the issue: everything beside weights and the KV pool.
const MOST_WORKSPACE: u64 = 2_000_000_000;
/// What recorded steps' executables and late-loaded code may take of it; not counted here.
const UNCOUNTED: u64 = 512 << 20;
const STEP_TOKENS: u32 = 8192;
const BLOCK_TOKENS: usize = 16;

fn options() -> LoadOptions {
    LoadOptions {
        dtype: Dtype::Bf16,
        kv: KvBudget::Auto,
        block_tokens: BLOCK_TOKENS as u32,
        slots: 512,
        step_tokens: STEP_TOKENS,
        step_patches: 16_384,
        ..LoadOptions::in_process(ModelName::new("count").unwrap(), ActorId::new("count").unwrap())
    }
}

fn engine(
    config: &serde_json::Value,
    device: &Counting,
    options: &LoadOptions,
) -> Result<Engine<Counting>, ExecutorError> {
    Engine::new(device.clone(), models::build(config, device)?, "count".into(), options)
}

/// Zeros for every page.
struct Zeros;

impl MediaSource for Zeros {
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError> {
        Ok(Bytes::from(vec![0; page.bytes as usize]))
    }
}

/// A linear congruential generator: enough to vary sizes.
struct Sizes(u64);

impl Sizes {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most.max(1)
    }
}

fn image(sizes: &mut Sizes) -> MediaItem {
    let (grid_h, grid_w) = (2 + 2 * sizes.below(32) as u32, 2 + 2 * sizes.below(32) as u32);
    let shape = vec![grid_h * grid_w, 3, 1, 16, 16];
    let hash = [sizes.below(40) as u8; 16];
    let bytes = shape.iter().map(|n| u64::from(*n)).product::<u64>() * 2;
    let node = ActorId::new("count").unwrap();
    let patches = PageRef { node, page: 1, dtype: PageDtype::Bf16, shape, bytes, hash };
    MediaItem { start: 0, tokens: grid_h * grid_w / 4, grid_h, grid_w, patches, normalise: None }
}

/// A prompt step of random sequences that fills at most a step, and a decode step of the same. Some continue a long text.
fn round(engine: &mut dyn StepEngine, sizes: &mut Sizes, before: usize, sees: bool) -> usize {
    let (mut open, mut work, mut again) = (Vec::new(), Vec::new(), Vec::new());
    let (mut tokens, mut block) = (0, 0);
    let most = if sizes.below(2) == 0 { 4 } else { 500 };
    let many = 1 + sizes.below(most);
    for slot in 0..many as u32 {
        let media: Vec<MediaItem> = if sees && slot < 8 { vec![image(sizes)] } else { Vec::new() };
        let placeholders = media.first().map_or(0, |item| item.tokens as usize);
        let count = placeholders + 1 + sizes.below(STEP_TOKENS as usize / many);
        if tokens + count > STEP_TOKENS as usize {
            break;
        }
        tokens += count;
        let cached = if media.is_empty() && sizes.below(50) == 0 { sizes.below(16_000) * BLOCK_TOKENS } else { 0 };
        let blocks = (count + 1).div_ceil(BLOCK_TOKENS) as u32;
        open.push(OpenSlot {
            slot: SlotId(slot),
            job: JobId::new("j").unwrap(),
            tokens: vec![1; cached + count],
            prompt_tokens: (cached + count) as u32,
            media,
            sampling: ResolvedSampling::greedy(),
            cached_tokens: cached as u32,
            blocks: vec![BlockId(0); cached / BLOCK_TOKENS],
        });
        let blocks_of = (block..block + blocks).map(BlockId).collect();
        work.push(SlotWork { slot: SlotId(slot), count: count as u32, sample: true, blocks: blocks_of });
        again.push(SlotWork { slot: SlotId(slot), count: 1, sample: true, blocks: Vec::new() });
        block += blocks;
    }
    let opened = open.len();
    let scheduler = ActorId::new("count").unwrap();
    let release = (0..before as u32).map(SlotId).collect();
    let first = StepPlan { scheduler, session: 1, step: 1, release, copies: Vec::new(), open, work };
    let second = StepPlan { release: Vec::new(), open: Vec::new(), work: again, ..first.clone() };
    for plan in [first, second] {
        let output = engine.step(&plan, &mut Zeros);
        assert_eq!((output.broken, output.failed, output.tokens.len()), (None, Vec::new(), opened));
    }
    opened
}

fn workspace(name: &str, config: &serde_json::Value, sees: bool) {
    let device = Counting::new(DEVICE_BYTES);
    let mut engine = engine(config, &device, &options()).unwrap();
    let started = device.memory();
    let mib = |kind| started.of(kind) >> 20;
    println!(
        "{name}: weights {} MiB, KV pool {} MiB, activations {} MiB (at most {} MiB at once), recorded steps {} MiB, features \
         {} MiB, scratch {} MiB, free {} MiB",
        mib(MemoryKind::Weights),
        mib(MemoryKind::KvPool),
        mib(MemoryKind::Activations),
        device.peak() >> 20,
        mib(MemoryKind::RecordedSteps),
        mib(MemoryKind::Features),
        mib(MemoryKind::Scratch),
        started.free_bytes >> 20,
    );
    let mut sizes = Sizes(7);
    let mut open = 0;
    for _ in 0..400 {
        open = round(&mut engine, &mut sizes, open, sees);
    }
    let after = device.memory();
    println!("{name}: {} allocations before 800 steps, {} after", started.allocations, after.allocations);
    let slabs = |kind| (started.of(kind), after.of(kind));
    let (before_steps, behind) = slabs(MemoryKind::Activations);
    assert_eq!(before_steps, behind, "{name}: what was rehearsed is enough for every step");
    assert_eq!(after.allocations, started.allocations, "{name}: a steady state allocates nothing");
    assert!(after.workspace_bytes() + UNCOUNTED <= MOST_WORKSPACE, "{name}: {after:?}");
    assert!(after.free_bytes >= UNCOUNTED, "{name}: the reserve is used up: {after:?}");
}

#[test]
fn the_text_model_keeps_within_two_gigabytes() {
    workspace("Qwen3-4B", &models::qwen3_4b(), false);
}

#[test]
fn the_vision_model_keeps_within_two_gigabytes() {
    workspace("Qwen3-VL-2B", &models::qwen3_vl_2b(), true);
}

/// The text of the error of loading `config` on a device of `bytes`.
fn refused(config: &serde_json::Value, bytes: u64, options: &LoadOptions) -> String {
    let device = Counting::new(bytes);
    let error = match engine(config, &device, options) {
        Err(error) => error,
        Ok(engine) => panic!("{:?} fits", engine.spec()),
    };
    assert_eq!(error.label(), "device_memory", "{error}");
    assert_eq!(device.memory().workspace_bytes() - device.memory().of(MemoryKind::Scratch), taken(&device), "{error}");
    error.to_string()
}

/// Slabs that stay: everything else is given back by what failed.
fn taken(device: &Counting) -> u64 {
    [MemoryKind::Activations, MemoryKind::RecordedSteps, MemoryKind::Features]
        .map(|kind| device.memory().of(kind))
        .iter()
        .sum()
}

#[test]
fn a_pool_that_does_not_fit_is_refused_with_the_sum() {
    let pool = LoadOptions { kv: KvBudget::Bytes(40 << 30), ..options() };
    let text = refused(&models::qwen3_4b(), 24 << 30, &pool);
    assert!(text.starts_with("out of device memory: weights 7.5"), "{text}");
    assert!(text.contains(" + KV pool 39.99 GiB + workspace 1."), "{text}");
    assert!(text.contains("GiB are asked for, and of 24.00 GiB in total "), "{text}");
    let most: u64 = text.split("at most \"").nth(1).and_then(|rest| rest.split("MiB").next()).unwrap().parse().unwrap();
    let fits = LoadOptions { kv: KvBudget::Bytes(most << 20), ..options() };
    engine(&models::qwen3_4b(), &Counting::new(24 << 30), &fits).expect("what the text advises fits");
}

#[test]
fn a_device_without_room_for_one_block_says_so() {
    let text = refused(&models::qwen3_4b(), 9 << 30, &options());
    assert!(
        text.ends_with("serve a smaller model, lower `[executor] step_tokens`, or free the device's memory"),
        "{text}"
    );
    // The rehearsal itself runs out.
    let text = refused(&models::qwen3_4b(), (7736 + 40 + 300) << 20, &options());
    assert!(text.contains("weights 7.55 GiB + KV pool 0 B + workspace"), "{text}");
}

#[test]
fn what_cannot_fit_is_refused_before_anything_is_loaded() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/fixtures/qwen3");
    let device = Counting::new(512 << 20);
    let small = LoadOptions { slots: 8, step_tokens: 64, ..options() };
    let error = match millrace_executor::engine::load_on(&dir, device.clone(), &small) {
        Err(error) => error,
        Ok(engine) => panic!("{:?} fits", engine.spec()),
    };
    assert_eq!(error.label(), "device_memory", "{error}");
    let text = error.to_string();
    assert!(text.contains(" + KV pool 0 B + workspace 1.00 GiB = 1.0"), "{text}");
    assert!(text.contains("and of 512.00 MiB in total 512.00 MiB are free"), "{text}");
    assert_eq!((device.memory().allocations, device.memory().of(MemoryKind::Weights)), (1, 0), "scratch memory alone");
    // With room for it the same options load.
    let roomy = Counting::new(4 << 30);
    millrace_executor::engine::load_on(&dir, roomy, &small).unwrap();
}
