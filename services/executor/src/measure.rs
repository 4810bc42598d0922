//! What an engine's work costs, measured on the engine itself before it serves: the scheduler weighs copying blocks
//! against computing them again by it.

use std::time::Duration;

use bytes::Bytes;
use millrace_protocol::engine::{EngineCosts, EngineSpec};
use millrace_protocol::plan::{BlockCopy, OpenSlot, SlotWork, StepPlan};
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ActorId, BlockId, ErrorCode, JobError, JobId, PageRef, SlotId};
use millrace_runtime::Clock;

use crate::engine::{MediaSource, StepEngine};

/// Prompt lengths are doubled until a step takes this long: then launches and cold caches weigh little.
const LONG_ENOUGH: Duration = Duration::from_millis(50);
/// First and longest prompt.
const PROMPT_TOKENS: (u32, u32) = (8, 512);
/// Copies in one measurement, each way.
const COPIES: u32 = 32;

/// Measures. Leaves the engine reset; its pool holds garbage that nobody refers to. All zero if the engine cannot swap, or
/// fails: then nothing is swapped, and the fault shows in the first real step.
pub fn measure(engine: &mut dyn StepEngine, host_blocks: u32, clock: &Clock) -> EngineCosts {
    let costs = if host_blocks == 0 { None } else { costs(engine, host_blocks, clock) };
    engine.reset();
    costs.unwrap_or_default()
}

fn costs(engine: &mut dyn StepEngine, host_blocks: u32, clock: &Clock) -> Option<EngineCosts> {
    let spec = engine.spec();
    let token_ns = token_cost(engine, &spec, clock)?;
    let copies = COPIES.min(host_blocks).min(spec.blocks);
    let out = |n| BlockCopy::Out { block: BlockId(n), page: n };
    let back = |n| BlockCopy::In { page: n, block: BlockId(n) };
    // The first round takes the memory.
    copy_cost(engine, (0..copies).map(out).collect(), clock)?;
    let swap_out_ns = copy_cost(engine, (0..copies).map(out).collect(), clock)?;
    let swap_in_ns = copy_cost(engine, (0..copies).map(back).collect(), clock)?;
    Some(EngineCosts { token_ns, swap_out_ns, swap_in_ns, host_blocks })
}

/// Nanoseconds for one prompt token of the longest prompt tried.
fn token_cost(engine: &mut dyn StepEngine, spec: &EngineSpec, clock: &Clock) -> Option<u64> {
    let most = PROMPT_TOKENS.1.min(spec.step_tokens).min(spec.max_tokens.saturating_sub(1));
    let most = most.min(spec.blocks.saturating_mul(spec.block_tokens));
    let mut tokens = PROMPT_TOKENS.0.min(most);
    if tokens == 0 {
        return None;
    }
    loop {
        engine.reset();
        let took = run(engine, prompt(spec, tokens)?, clock)?;
        if took >= LONG_ENOUGH || tokens == most {
            return Some(nanos(took) / u64::from(tokens));
        }
        tokens = (tokens * 2).min(most);
    }
}

fn copy_cost(engine: &mut dyn StepEngine, copies: Vec<BlockCopy>, clock: &Clock) -> Option<u64> {
    let count = copies.len() as u64;
    let took = run(engine, StepPlan { copies, ..empty()? }, clock)?;
    nanos(took).checked_div(count)
}

fn run(engine: &mut dyn StepEngine, plan: StepPlan, clock: &Clock) -> Option<Duration> {
    let started = clock.now();
    let output = engine.step(&plan, &mut NoMedia);
    engine.wait();
    let took = clock.now().saturating_duration_since(started);
    if let Some(why) = &output.broken {
        tracing::warn!(%why, "the engine's costs cannot be measured");
    }
    (output.broken.is_none() && output.failed.is_empty()).then_some(took)
}

fn prompt(spec: &EngineSpec, tokens: u32) -> Option<StepPlan> {
    let blocks: Vec<BlockId> = (0..tokens.div_ceil(spec.block_tokens.max(1))).map(BlockId).collect();
    let open = OpenSlot {
        slot: SlotId(0),
        job: JobId::new("measure").ok()?,
        tokens: (0..tokens).map(|n| n % spec.vocab.max(1)).collect(),
        prompt_tokens: tokens,
        media: Vec::new(),
        sampling: ResolvedSampling::greedy(),
        cached_tokens: 0,
        blocks: Vec::new(),
    };
    let work = SlotWork { slot: SlotId(0), count: tokens, sample: true, blocks };
    Some(StepPlan { open: vec![open], work: vec![work], ..empty()? })
}

fn empty() -> Option<StepPlan> {
    Some(StepPlan {
        scheduler: ActorId::new("measure").ok()?,
        session: 0,
        step: 0,
        release: Vec::new(),
        copies: Vec::new(),
        open: Vec::new(),
        work: Vec::new(),
    })
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The prompts measured hold no media.
struct NoMedia;

impl MediaSource for NoMedia {
    fn patches(&mut self, _: &PageRef) -> Result<Bytes, JobError> {
        Err(JobError::new(ErrorCode::Internal, "a measurement asked for media"))
    }
}
