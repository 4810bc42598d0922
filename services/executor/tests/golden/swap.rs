//! Blocks that were in host memory: what comes back is what left, so that a sequence goes on with equal bits.

use millrace_executor::{Dtype, StepEngine};
use millrace_protocol::plan::{BlockCopy, OpenSlot, SlotWork, StepPlan};
use millrace_protocol::{ActorId, BlockId, JobId, SlotId};
use millrace_runtime::Clock;

use crate::fixture::{Case, Family};

const BLOCK_TOKENS: usize = 5;

fn plan(copies: Vec<BlockCopy>, open: Vec<OpenSlot>, work: Vec<SlotWork>) -> StepPlan {
    StepPlan { scheduler: ActorId::new("s").unwrap(), session: 1, step: 1, release: vec![], copies, open, work }
}

fn open(slot: u32, case: &Case, tokens: Vec<u32>, cached: usize, blocks: &[u32]) -> OpenSlot {
    let request = case.greedy();
    OpenSlot {
        slot: SlotId(slot),
        job: JobId::new("j").unwrap(),
        prompt_tokens: request.prompt.len() as u32,
        tokens,
        media: vec![],
        sampling: request.sampling,
        cached_tokens: cached as u32,
        blocks: blocks.iter().copied().map(BlockId).collect(),
    }
}

fn work(slot: u32, count: usize, blocks: impl IntoIterator<Item = u32>) -> SlotWork {
    let blocks = blocks.into_iter().map(BlockId).collect();
    SlotWork { slot: SlotId(slot), count: count as u32, sample: true, blocks }
}

fn run(engine: &mut dyn StepEngine, family: &mut Family, plan: &StepPlan) -> (Vec<u32>, Vec<u32>) {
    let output = engine.step(plan, family);
    assert_eq!((output.broken, output.failed), (None, vec![]));
    let bits = engine.take_logits().pop().map(|row| row.logits.iter().map(|x| x.to_bits()).collect());
    (output.tokens.iter().map(|token| token.token).collect(), bits.unwrap_or_default())
}

/// Blocks that a prompt may take beside the places that the test uses.
const MOST_BLOCKS: usize = 40;

/// The longest prompt without media that has room.
fn longest(family: &Family) -> &Case {
    let most = MOST_BLOCKS * BLOCK_TOKENS;
    let texts = family.cases.iter().filter(|case| case.media.is_empty() && case.greedy().prompt.len() <= most);
    texts.max_by_key(|case| case.greedy().prompt.len()).unwrap()
}

/// A sequence's next token and logits after its blocks went to host memory, others used their places, and they came back
/// elsewhere; and the same without all that, from the same cached blocks.
fn swapped_and_not(name: &str, dtype: Dtype) -> [(Vec<u32>, Vec<u32>); 2] {
    let mut family = Family::open(name);
    let prompt = longest(&family).greedy().prompt;
    let full = (prompt.len() - 1) / BLOCK_TOKENS;
    assert!(full > 0 && full <= MOST_BLOCKS, "{full} full blocks");
    let cached = full * BLOCK_TOKENS;
    let home: Vec<u32> = (10..10 + prompt.len().div_ceil(BLOCK_TOKENS) as u32).collect();
    [true, false].map(|swapped| {
        let mut engine = family.engine(dtype);
        assert!(engine.keep_host_blocks(64 << 20) as usize > full);
        let first = open(0, longest(&family), prompt.clone(), 0, &[]);
        let mut step = plan(vec![], vec![first], vec![work(0, prompt.len(), home.clone())]);
        run(&mut engine, &mut family, &step);
        // Pages in an order of their own.
        let page = |n: usize| (full - 1 - n) as u32;
        let (mut copies, mut table) = (vec![], home[..full].to_vec());
        if swapped {
            copies.extend((0..full).map(|n| BlockCopy::Out { block: BlockId(home[n]), page: page(n) }));
        }
        let other: Vec<u32> = prompt.iter().rev().copied().collect();
        let place = if swapped { home.clone() } else { (100..100 + home.len() as u32).collect() };
        step = plan(copies, vec![open(1, longest(&family), other, 0, &[])], vec![work(1, prompt.len(), place)]);
        step.release = vec![SlotId(0)];
        run(&mut engine, &mut family, &step);
        let mut copies = vec![];
        if swapped {
            table = (0..full as u32).map(|n| 60 + 7 * n % 40).collect();
            copies.extend((0..full).map(|n| BlockCopy::In { page: page(n), block: BlockId(table[n]) }));
        }
        let again = open(2, longest(&family), prompt.clone(), cached, &table);
        run(&mut engine, &mut family, &plan(copies, vec![again], vec![work(2, prompt.len() - cached, [150])]))
    })
}

#[test]
fn a_swapped_sequence_goes_on_with_equal_bits() {
    for name in ["qwen3_vl", "qwen3", "qwen3_moe", "glm4_moe_lite"] {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let [swapped, stayed] = swapped_and_not(name, dtype);
            assert!(!stayed.1.is_empty() && swapped == stayed, "{name} {dtype:?}");
        }
    }
}

#[test]
fn copies_that_contradict_the_engine_break_the_session() {
    let mut family = Family::open("qwen3");
    let mut engine = family.engine(Dtype::F32);
    let mut broken = |copy| engine.step(&plan(vec![copy], vec![], vec![]), &mut family).broken.unwrap_or_default();
    assert!(broken(BlockCopy::Out { block: BlockId(0), page: 0 }).contains("host page 0 of 0"));
    let mut engine = family.engine(Dtype::F32);
    let pages = engine.keep_host_blocks(1 << 20);
    let mut broken = |copy| engine.step(&plan(vec![copy], vec![], vec![]), &mut family).broken.unwrap_or_default();
    assert!(broken(BlockCopy::In { block: BlockId(0), page: 0 }).contains("never written"));
    assert!(broken(BlockCopy::Out { block: BlockId(200), page: 0 }).contains("block 200 of a pool of 200"));
    assert!(broken(BlockCopy::In { block: BlockId(0), page: pages }).contains("host page"));
    assert_eq!(broken(BlockCopy::Out { block: BlockId(199), page: pages - 1 }), "");
    assert_eq!(broken(BlockCopy::In { block: BlockId(0), page: pages - 1 }), "");
}

#[test]
fn costs_are_measured_on_the_engine_and_leave_it_free() {
    let mut family = Family::open("qwen3");
    let mut engine = family.engine(Dtype::F32);
    let host_blocks = engine.keep_host_blocks(1 << 20);
    let costs = millrace_executor::measure::measure(&mut engine, host_blocks, &Clock::system());
    assert!(costs.token_ns > 0 && costs.swap_out_ns > 0 && costs.swap_in_ns > 0, "{costs:?}");
    assert_eq!(costs.host_blocks, host_blocks);
    let request = longest(&family).greedy();
    let result = family.run(&mut engine, std::slice::from_ref(&request), &Default::default()).remove(0);
    assert_eq!(result.tokens, longest(&family).answer);
    let none = engine.keep_host_blocks(0);
    assert_eq!(
        (none, millrace_executor::measure::measure(&mut engine, none, &Clock::system())),
        (0, Default::default())
    );
}
