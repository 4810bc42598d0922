//! The engine on a CUDA device: nothing is allocated in a steady state, swapped blocks and demoted features give equal bits, and
//! what does not fit is refused at once. Writes its own small checkpoint; skips, and says so, without a device.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // In tests a panic is the failure.

use std::path::Path;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use millrace_executor::random_weights::{RandomOptions, write_random};
use millrace_executor::{DeviceKind, Dtype, ExecutorError, KvBudget, LoadOptions, MediaSource, StepEngine, load};
use millrace_kernels::{DeviceMemory, KernelError};
use millrace_protocol::plan::{BlockCopy, OpenSlot, SlotWork, StepPlan};
use millrace_protocol::ready::MediaItem;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ActorId, BlockId, JobError, JobId, ModelName, PageDtype, PageRef, SlotId};
use millrace_runtime::Clock;
use serde_json::json;

const BLOCK_TOKENS: usize = 16;
const VOCAB: u32 = 1024;

/// A small Qwen3-VL with heads of 128 and a tower of heads of 64.
fn checkpoint() -> tempfile::TempDir {
    let config = json!({
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": true,
        "text_config": {
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 512, "intermediate_size": 1024,
            "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 4,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 5_000_000, "vocab_size": VOCAB,
            "rope_scaling": { "mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default" },
        },
        "vision_config": {
            "deepstack_visual_indexes": [0, 1], "depth": 3, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 256,
            "in_channels": 3, "intermediate_size": 512, "num_heads": 4, "num_position_embeddings": 256,
            "out_hidden_size": 512, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    });
    let folder = tempfile::tempdir().unwrap();
    let from = tempfile::tempdir().unwrap();
    std::fs::write(from.path().join("config.json"), config.to_string()).unwrap();
    write_random(from.path(), folder.path(), &RandomOptions { layers: None, seed: 5 }).unwrap();
    folder
}

fn options() -> LoadOptions {
    LoadOptions {
        device: DeviceKind::Cuda(0),
        dtype: Dtype::Bf16,
        kv: KvBudget::Blocks(1000),
        block_tokens: BLOCK_TOKENS as u32,
        slots: 32,
        ..LoadOptions::in_process(ModelName::new("small").unwrap(), ActorId::new("test").unwrap())
    }
}

fn engine(dir: &Path, options: &LoadOptions) -> Option<Box<dyn StepEngine>> {
    match load(dir, options) {
        Ok(engine) => Some(engine),
        Err(ExecutorError::Kernel(KernelError::NoDevice(why))) => {
            println!("skipped: {why}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Pixels that follow the page's number.
struct Pages;

impl MediaSource for Pages {
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError> {
        let value = |n: u64| half::bf16::from_f32(((n * 7919 + page.page * 104_729) % 2001) as f32 / 1000.0 - 1.0);
        Ok((0..page.bytes / 2).flat_map(|n| value(n).to_le_bytes()).collect::<Vec<u8>>().into())
    }
}

/// An item of 8 x 8 patches: 16 placeholders.
fn item(content: u64) -> MediaItem {
    let (shape, hash) = (vec![64, 3, 1, 16, 16], u128::from(content).to_le_bytes());
    let node = ActorId::new("test").unwrap();
    let patches = PageRef { node, page: content, dtype: PageDtype::Bf16, shape, bytes: 64 * 3 * 256 * 2, hash };
    MediaItem { start: 0, tokens: 16, grid_h: 8, grid_w: 8, patches, normalise: None }
}

fn open(slot: u32, tokens: Vec<u32>, cached: usize, blocks: &[u32], media: Vec<MediaItem>) -> OpenSlot {
    OpenSlot {
        slot: SlotId(slot),
        job: JobId::new("j").unwrap(),
        prompt_tokens: tokens.len() as u32,
        tokens,
        media,
        sampling: ResolvedSampling::greedy(),
        cached_tokens: cached as u32,
        blocks: blocks.iter().copied().map(BlockId).collect(),
    }
}

fn work(slot: u32, count: usize, blocks: impl IntoIterator<Item = u32>) -> SlotWork {
    SlotWork {
        slot: SlotId(slot),
        count: count as u32,
        sample: true,
        blocks: blocks.into_iter().map(BlockId).collect(),
    }
}

fn plan(release: &[u32], copies: Vec<BlockCopy>, open: Vec<OpenSlot>, work: Vec<SlotWork>) -> StepPlan {
    let release = release.iter().copied().map(SlotId).collect();
    StepPlan { scheduler: ActorId::new("s").unwrap(), session: 1, step: 1, release, copies, open, work }
}

fn run(engine: &mut dyn StepEngine, plan: &StepPlan) -> (Vec<u32>, Vec<u32>) {
    let output = engine.step(plan, &mut Pages);
    assert_eq!((output.broken, output.failed), (None, vec![]));
    let bits = engine.take_logits().pop().map(|row| row.logits.iter().map(|x| x.to_bits()).collect());
    (output.tokens.iter().map(|token| token.token).collect(), bits.unwrap_or_default())
}

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|n| (n * 37 + seed * 101 + 5) % VOCAB).collect()
}

fn memory(engine: &dyn StepEngine) -> DeviceMemory {
    engine.memory_reader().unwrap()().unwrap()
}

#[test]
fn a_steady_state_allocates_nothing() {
    let folder = checkpoint();
    let Some(mut engine) = engine(folder.path(), &options()) else { return };
    println!("at start: {:?}", memory(engine.as_ref()));
    let mut round = |seed: u32| {
        // Prompts of many lengths, two with an image, then three decode steps of all of them.
        let lengths: Vec<usize> = (0..1 + seed % 31).map(|n| 17 + ((n * 97 + seed * 31) % 60) as usize).collect();
        let (mut opens, mut works, mut block) = (vec![], vec![], 0);
        for (slot, length) in (0..).zip(&lengths) {
            let media = if slot < 2 { vec![item(u64::from(seed % 5 + slot))] } else { vec![] };
            let blocks = (length + 3).div_ceil(BLOCK_TOKENS) as u32;
            opens.push(open(slot, tokens(*length, seed + slot), 0, &[], media));
            works.push(work(slot, *length, block..block + blocks));
            block += blocks;
        }
        let slots: Vec<u32> = (0..lengths.len() as u32).collect();
        run(engine.as_mut(), &plan(&[], vec![], opens, works));
        for _ in 0..3 {
            run(engine.as_mut(), &plan(&[], vec![], vec![], slots.iter().map(|slot| work(*slot, 1, [])).collect()));
        }
        run(engine.as_mut(), &plan(&slots, vec![], vec![], vec![]));
        memory(engine.as_ref())
    };
    // The first rounds fill the encoder cache.
    let before = (0..5).map(&mut round).last().unwrap();
    let after = (5..80).map(&mut round).last().unwrap();
    println!("after 400 steps: {after:?}");
    assert_eq!((before.allocations, before.held), (after.allocations, after.held));
}

#[test]
fn the_longest_job_allocates_nothing() {
    let folder = checkpoint();
    let Some(mut engine) = engine(folder.path(), &options()) else { return };
    // Blocks of 16 tokens up to the 8,192 of the model, beside short sequences.
    let most = 8192 / BLOCK_TOKENS as u32;
    let mut round = |cached_blocks: u32| {
        let cached = cached_blocks as usize * BLOCK_TOKENS;
        let mut opens = vec![open(0, tokens(cached + 9, 1), cached, &(0..cached_blocks).collect::<Vec<_>>(), vec![])];
        let mut works = vec![work(0, 9, [cached_blocks])];
        for slot in 1..9 {
            opens.push(open(slot, tokens(5, slot), 0, &[], vec![]));
            works.push(work(slot, 5, [most + slot]));
        }
        run(engine.as_mut(), &plan(&[], vec![], opens, works));
        for live in [9, 4, 1] {
            run(engine.as_mut(), &plan(&[], vec![], vec![], (0..live).map(|slot| work(slot, 1, [])).collect()));
        }
        run(engine.as_mut(), &plan(&(0..9).collect::<Vec<_>>(), vec![], vec![], vec![]));
        memory(engine.as_ref())
    };
    let before = round(1);
    for cached_blocks in [63, 64, 128, 300, most - 1] {
        let after = round(cached_blocks);
        assert_eq!((before.allocations, before.held), (after.allocations, after.held), "{cached_blocks} blocks");
    }
}

#[test]
fn a_swapped_sequence_goes_on_with_equal_bits() {
    let folder = checkpoint();
    let options = LoadOptions { keep_logits: true, ..options() };
    let prompt = tokens(150, 3);
    let (full, home): (usize, Vec<u32>) = (9, (10..20).collect());
    let mut results = vec![];
    // One engine: which algorithm is fastest is measured, and another one may round otherwise.
    let Some(mut engine) = engine(folder.path(), &options) else { return };
    assert!(engine.keep_host_blocks(64 << 20) as usize > full);
    for swapped in [true, false] {
        engine.reset();
        let first = open(0, prompt.clone(), 0, &[], vec![]);
        run(engine.as_mut(), &plan(&[], vec![], vec![first], vec![work(0, 150, home.clone())]));
        let page = |n: usize| (full - 1 - n) as u32;
        let (mut copies, mut table) = (vec![], home[..full].to_vec());
        if swapped {
            copies.extend((0..full).map(|n| BlockCopy::Out { block: BlockId(home[n]), page: page(n) }));
        }
        // Another sequence takes the places at once, or others.
        let place: Vec<u32> = if swapped { home.clone() } else { (100..110).collect() };
        let other = open(1, tokens(150, 8), 0, &[], vec![]);
        run(engine.as_mut(), &plan(&[0], copies, vec![other], vec![work(1, 150, place)]));
        let mut copies = vec![];
        if swapped {
            table = (0..full as u32).map(|n| 60 + 7 * n % 40).collect();
            copies.extend((0..full).map(|n| BlockCopy::In { page: page(n), block: BlockId(table[n]) }));
        }
        let again = open(2, prompt.clone(), full * BLOCK_TOKENS, &table, vec![]);
        results.push(run(engine.as_mut(), &plan(&[], copies, vec![again], vec![work(2, 6, [150])])));
    }
    assert!(!results[0].1.is_empty() && results[0] == results[1]);
}

#[test]
fn copies_have_a_cost() {
    let folder = checkpoint();
    let Some(mut engine) = engine(folder.path(), &options()) else { return };
    let host_blocks = engine.keep_host_blocks(64 << 20);
    let costs = millrace_executor::measure::measure(engine.as_mut(), host_blocks, &Clock::system());
    println!("{costs:?}");
    // 4 layers x 2 x 16 tokens x 2 heads x 128 x 2 bytes: no bus moves 64 KiB in 500 ns.
    assert!(costs.token_ns > 0 && costs.swap_out_ns > 500 && costs.swap_in_ns > 500, "{costs:?}");
}

#[test]
fn demoted_features_come_back_with_equal_bits() {
    let folder = checkpoint();
    // 16 rows x 512 x 3 parts x 2 bytes an item: room for two on the device, or for none.
    for device_bytes in [2 * 49_152, 0] {
        let sizes = LoadOptions { encoder_device_bytes: device_bytes, encoder_host_bytes: 1 << 20, ..options() };
        let Some(mut engine) = engine(folder.path(), &LoadOptions { keep_logits: true, ..sizes }) else { return };
        let mut own = vec![];
        for content in [1, 2, 3, 4, 1, 2, 3, 4] {
            let one = open(0, tokens(40, 1), 0, &[], vec![item(content)]);
            own.push(run(engine.as_mut(), &plan(&[], vec![], vec![one], vec![work(0, 40, 0..3)])));
            run(engine.as_mut(), &plan(&[0], vec![], vec![], vec![]));
        }
        let counts = engine.encoder_counts().unwrap();
        let counts = [&counts.device, &counts.host, &counts.misses].map(|count| count.load(Ordering::Relaxed));
        assert_eq!(counts, if device_bytes > 0 { [0, 4, 4] } else { [0, 0, 8] });
        // Within one engine: which algorithm is fastest is measured, and another one may round otherwise.
        assert!(own[..4] == own[4..] && own[0] != own[1]);
    }
}

#[test]
fn a_pool_larger_than_the_device_is_refused_before_loading() {
    let folder = checkpoint();
    let started = Clock::system().now();
    match load(folder.path(), &LoadOptions { kv: KvBudget::Bytes(1 << 42), ..options() }).map(|engine| engine.spec()) {
        Err(ExecutorError::Kernel(KernelError::NoDevice(why))) => println!("skipped: {why}"),
        Err(error) => {
            println!("{:?} after {:?}", error.to_string(), Clock::system().now() - started);
            assert_eq!(error.label(), "device_memory");
            assert!(error.to_string().contains("`[executor] kv_bytes` to \"auto\""), "{error}");
        }
        Ok(spec) => panic!("{spec:?} fits"),
    }
}
