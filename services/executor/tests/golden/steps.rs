//! The engine's contract: contradictions break the session, a bad sequence fails alone, cached and resumed sequences go on as
//! if nothing had happened.

use bytes::Bytes;
use millrace_executor::generate::Request;
use millrace_executor::{Dtype, MediaSource, StepEngine};
use millrace_protocol::plan::{OpenSlot, SlotWork, StepPlan};
use millrace_protocol::ready::Normalise;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::step::StepOutput;
use millrace_protocol::{ActorId, BlockId, ErrorCode, JobError, JobId, PageDtype, PageRef, SlotId};

use crate::fixture::Family;

/// A pager that has nothing.
struct NoPages;

impl MediaSource for NoPages {
    fn patches(&mut self, _page: &PageRef) -> Result<Bytes, JobError> {
        Err(JobError::new(ErrorCode::MediaMissing, "gone"))
    }
}

/// A pager whose pixels are not numbers.
struct NanPages;

impl MediaSource for NanPages {
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError> {
        Ok(f32::NAN.to_le_bytes().repeat(page.bytes as usize / 4).into())
    }
}

fn plan(open: Vec<OpenSlot>, work: Vec<SlotWork>) -> StepPlan {
    let scheduler = ActorId::new("s").unwrap();
    StepPlan { scheduler, session: 4, step: 9, release: Vec::new(), copies: Vec::new(), open, work }
}

fn open(slot: u32, request: &Request) -> OpenSlot {
    OpenSlot {
        slot: SlotId(slot),
        job: JobId::new("j").unwrap(),
        tokens: [request.prompt.as_slice(), &request.answer].concat(),
        prompt_tokens: request.prompt.len() as u32,
        media: request.media.clone(),
        sampling: request.sampling.clone(),
        cached_tokens: 0,
        blocks: Vec::new(),
    }
}

/// All of a slot's tokens in one go, in blocks from `first` up (5 tokens each).
fn whole(open: &OpenSlot, first: u32) -> SlotWork {
    let count = open.tokens.len() as u32 - open.cached_tokens;
    let blocks = open.tokens.len().div_ceil(5) - open.blocks.len();
    SlotWork { slot: open.slot, count, sample: true, blocks: (first..first + blocks as u32).map(BlockId).collect() }
}

fn text_slot(slot: u32) -> (Family, OpenSlot) {
    let family = Family::open("qwen3_vl");
    let open = open(slot, &family.case("text").greedy());
    (family, open)
}

fn broken(change: impl FnOnce(&mut StepPlan)) -> String {
    let (mut family, open) = text_slot(2);
    let work = whole(&open, 0);
    let mut plan = plan(vec![open], vec![work]);
    change(&mut plan);
    let output = family.engine(Dtype::F32).step(&plan, &mut family);
    assert_eq!((output.session, output.step, output.tokens.len()), (4, 9, 0));
    output.broken.expect("a broken session")
}

#[test]
fn plans_that_contradict_the_engine_break_the_session() {
    assert!(broken(|plan| plan.work[0].slot = SlotId(3)).contains("slot 3, not open"));
    assert!(broken(|plan| plan.release.push(SlotId(5))).contains("slot 5, not open"));
    assert!(broken(|plan| plan.open.push(plan.open[0].clone())).contains("slot 2"));
    assert!(broken(|plan| plan.open[0].slot = SlotId(8)).contains("slot 8"));
    assert!(broken(|plan| plan.work[0].blocks[1] = BlockId(200)).contains("block 200 of a pool of 200"));
    assert!(broken(|plan| plan.work[0].count += 1).contains("tokens after 0 of"));
    assert!(broken(|plan| plan.work[0].count = 0).contains("0 tokens"));
    assert!(broken(|plan| plan.work[0].count -= 1).contains("a draw after token"));
    assert!(broken(|plan| plan.work[0].blocks.truncate(2)).contains("in 2 blocks"));
    assert!(broken(|plan| plan.work.push(plan.work[0].clone())).contains("twice"));
    assert!(broken(|plan| plan.open[0].cached_tokens = 4).contains("4 cached"));
    assert!(broken(|plan| plan.open[0].prompt_tokens = 1000).contains("1000 prompt tokens"));
    assert!(
        broken(|plan| {
            plan.open[0].tokens = vec![1; 2049];
            plan.work[0].sample = false;
            plan.work[0].count = 2049;
        })
        .contains("2049 tokens in a step of at most 2048")
    );
}

#[test]
fn the_unchanged_plan_runs_and_reset_forgets_its_slot() {
    let (mut family, open) = text_slot(2);
    let plan = plan(vec![open.clone()], vec![whole(&open, 0)]);
    let mut engine = family.engine(Dtype::F32);
    for _ in 0..2 {
        let output = engine.step(&plan, &mut family);
        assert_eq!(output.broken, None);
        assert_eq!(output.tokens[0].token, family.case("text").answer[0]);
        engine.reset();
    }
}

/// A text beside a case with images, whose pages come from `media`.
fn beside(case: &str, media: &mut dyn MediaSource, change: impl FnOnce(&mut OpenSlot)) -> (StepOutput, StepOutput) {
    let (mut family, text) = text_slot(0);
    let mut other = open(1, &family.case(case).greedy());
    change(&mut other);
    let work = vec![whole(&other, 50), whole(&text, 0)];
    let mut engine = family.engine(Dtype::F32);
    let output = engine.step(&plan(vec![text.clone(), other], work), media);
    assert_eq!(output.broken, None);
    assert_eq!(output.tokens.len(), 1);
    assert_eq!((output.tokens[0].slot, output.tokens[0].token), (SlotId(0), family.case("text").answer[0]));
    // A plan made before the scheduler knew of the failure, then the release.
    let decode = |slot, blocks: Vec<BlockId>| SlotWork { slot: SlotId(slot), count: 1, sample: true, blocks };
    let spare = if text.tokens.len() % 5 == 0 { vec![BlockId(99)] } else { Vec::new() };
    let mut next = plan(vec![], vec![decode(1, vec![]), decode(0, spare)]);
    next.release = vec![];
    let second = engine.step(&next, &mut family);
    assert_eq!((second.broken.clone(), second.failed.len(), second.tokens.len()), (None, 0, 1));
    let mut last = plan(vec![], vec![]);
    last.release = vec![SlotId(1), SlotId(0)];
    assert_eq!(engine.step(&last, &mut family).broken, None);
    (output, second)
}

fn failure(output: &StepOutput) -> ErrorCode {
    assert_eq!(output.failed.len(), 1);
    assert_eq!(output.failed[0].0, SlotId(1));
    output.failed[0].1.code
}

#[test]
fn a_page_that_is_gone_fails_its_sequence_alone() {
    let (output, _) = beside("wide", &mut NoPages, |_| {});
    assert_eq!(failure(&output), ErrorCode::MediaMissing);
}

#[test]
fn pixels_that_are_no_numbers_fail_their_sequence_alone() {
    let (output, second) = beside("wide", &mut NanPages, |_| {});
    assert_eq!(failure(&output), ErrorCode::NotFinite);
    let family = Family::open("qwen3_vl");
    assert_eq!(second.tokens[0].token, family.case("text").answer[1]);
}

#[test]
fn a_page_of_another_shape_fails_its_sequence_alone() {
    let (output, _) = beside("wide", &mut NanPages, |open| open.media[0].patches.shape[3] = 8);
    assert_eq!(failure(&output), ErrorCode::MediaMismatch);
    let (output, _) = beside("wide", &mut NanPages, |open| open.media[0].patches.dtype = PageDtype::Bf16);
    assert_eq!(failure(&output), ErrorCode::MediaMismatch);
    let (output, _) = beside("wide", &mut NanPages, |open| {
        open.media[0].normalise = Some(Normalise { mean: [0.5; 3], std: [0.5; 3] });
    });
    assert_eq!(failure(&output), ErrorCode::MediaMismatch);
    let (output, _) = beside("wide", &mut NanPages, |open| open.media[0].tokens += 1);
    assert_eq!(failure(&output), ErrorCode::MediaMismatch);
}

#[test]
fn tokens_outside_the_vocabulary_fail_their_sequence_alone() {
    let (output, _) = beside("text", &mut NoPages, |open| open.tokens[3] = 331);
    assert_eq!(failure(&output), ErrorCode::TokenRange);
}

#[test]
fn a_cached_prefix_stands_for_its_tokens() {
    let mut family = Family::open("qwen3_vl");
    let request = family.case("mixed").greedy();
    let mut engine = family.engine(Dtype::F32);
    let first = open(0, &request);
    let output = engine.step(&plan(vec![first.clone()], vec![whole(&first, 0)]), &mut family);
    let logits = engine.take_logits().pop().unwrap();
    // The second sequence shares the first one's leading blocks, in the middle of an image too; pages are still needed then.
    for blocks in [1u32, 2, 3, 5] {
        let mut second = open(blocks, &request);
        second.cached_tokens = blocks * 5;
        second.blocks = (0..blocks).map(BlockId).collect();
        let again = engine.step(&plan(vec![second.clone()], vec![whole(&second, 20 + 20 * blocks)]), &mut family);
        assert_eq!(again.broken, None);
        assert_eq!(again.tokens[0].token, output.tokens[0].token);
        assert!(engine.take_logits().pop().unwrap().logits == logits.logits, "{blocks} cached blocks");
    }
}

#[test]
fn a_resumed_answer_goes_on_with_the_same_draws() {
    let mut family = Family::open("qwen3_vl");
    let sampling = ResolvedSampling {
        temperature: 1.1,
        top_k: 30,
        repetition_penalty: 1.2,
        frequency_penalty: 0.1,
        seed: 77,
        logprobs: Some(2),
        ..ResolvedSampling::greedy()
    };
    let request = Request { sampling, ..family.case("clip").greedy() };
    let mut engine = family.engine(Dtype::F32);
    let whole = family.run(&mut engine, std::slice::from_ref(&request), &Default::default()).remove(0);
    assert_ne!(whole.tokens, family.case("clip").answer);
    assert_eq!(whole.logprobs.len(), 32);
    for known in [1, 17, 31] {
        let resumed = Request { answer: whole.tokens[..known].to_vec(), ..request.clone() };
        let result = family.run(&mut engine, &[resumed], &Default::default()).remove(0);
        assert_eq!(result.tokens, whole.tokens, "resumed after {known}");
    }
}

#[test]
fn a_page_seen_before_is_neither_read_nor_encoded_again() {
    let mut family = Family::open("qwen3_vl");
    let request = family.case("clip").greedy();
    let mut engine = family.engine(Dtype::F32);
    let first = family.run(&mut engine, std::slice::from_ref(&request), &Default::default());
    assert_eq!(family.reads, 3);
    let again = family.run(&mut engine, std::slice::from_ref(&request), &Default::default());
    assert_eq!(family.reads, 3);
    assert!(first == again);
    // The same bytes under another grid are another picture.
    let mut turned = request.clone();
    for item in &mut turned.media {
        (item.grid_h, item.grid_w) = (item.grid_w, item.grid_h);
    }
    let other = family.run(&mut engine, &[turned], &Default::default());
    assert_eq!(family.reads, 6);
    assert!(other[0].logits != first[0].logits);
}

#[test]
fn the_encoder_works_in_runs_and_forgets_what_does_not_fit() {
    let mut family = Family::open("qwen3_vl");
    let (clip, two) = (family.case("clip").greedy(), family.case("two").greedy());
    let mut whole = family.engine(Dtype::F32);
    let expected = family.run(&mut whole, &[clip.clone(), two.clone()], &Default::default());
    // 24 patches an item of the clip: one fits, two do not; the larger picture (36) exceeds the limit alone.
    let row_bytes = crate::encoder_cache::row_bytes(&family);
    let mut narrow = family.engine_with(Dtype::F32, |options| {
        (options.step_patches, options.encoder_device_bytes) = (30, 30 / 4 * row_bytes);
    });
    family.reads = 0;
    for reads in [5, 10] {
        let results = family.run(&mut narrow, &[clip.clone(), two.clone()], &Default::default());
        assert!(results == expected);
        assert!(family.reads > reads - 5 && family.reads <= reads, "{} reads", family.reads);
    }
    assert!(family.reads > 5, "a cache of one item cannot hold five");
}
