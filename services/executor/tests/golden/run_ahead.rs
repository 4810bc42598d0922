//! Two steps under way: outputs are those of an engine that waits for each step, whatever the plans do with tokens that nobody
//! knows yet.

use std::collections::BTreeMap;

use millrace_executor::checkpoint::Checkpoint;
use millrace_executor::engine::Engine;
use millrace_executor::generate::{GenerateOptions, Generated, Request, generate};
use millrace_executor::{Dtype, LoadOptions, StepEngine, models};
use millrace_kernels::{Backend, CpuBackend};
use millrace_protocol::plan::{OpenSlot, SlotWork, StepPlan};
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::step::StepOutput;
use millrace_protocol::{ActorId, BlockId, ErrorCode, FinishReason, JobId, SlotId};

use crate::fixture::{Family, options};
use crate::mutant_backend::{Fault, MutantBackend};

/// Writes plans as a scheduler does that knows no token.
#[derive(Default)]
struct Script {
    plans: Vec<StepPlan>,
    /// Tokens known or drawn, and computed ones, of each open slot; its blocks.
    slots: BTreeMap<u32, (u32, u32, u32)>,
    next_block: u32,
}

impl Script {
    fn step(&mut self) -> &mut Self {
        let step = self.plans.len() as u64 + 1;
        let scheduler = ActorId::new("s").unwrap();
        let empty =
            StepPlan { scheduler, session: 1, step, release: vec![], copies: vec![], open: vec![], work: vec![] };
        self.plans.push(empty);
        self
    }

    fn release(&mut self, slot: u32) -> &mut Self {
        self.slots.remove(&slot).unwrap();
        self.plans.last_mut().unwrap().release.push(SlotId(slot));
        self
    }

    fn open(&mut self, slot: u32, prompt: &[u32], answer: &[u32], sampling: ResolvedSampling) -> &mut Self {
        let tokens = [prompt, answer].concat();
        self.slots.insert(slot, (tokens.len() as u32, 0, 0));
        self.plans.last_mut().unwrap().open.push(OpenSlot {
            slot: SlotId(slot),
            job: JobId::new("j").unwrap(),
            tokens,
            prompt_tokens: prompt.len() as u32,
            media: vec![],
            sampling,
            cached_tokens: 0,
            blocks: vec![],
        });
        self
    }

    /// Up to `count` tokens of `slot`, and a draw if they are its last.
    fn work(&mut self, slot: u32, count: u32) -> &mut Self {
        let (known, computed, blocks) = self.slots.get_mut(&slot).unwrap();
        let count = count.min(*known - *computed);
        *computed += count;
        let fresh = computed.div_ceil(5) - *blocks;
        *blocks += fresh;
        let sample = *computed == *known;
        *known += u32::from(sample);
        let blocks = (self.next_block..self.next_block + fresh).map(BlockId).collect();
        self.next_block += fresh;
        self.plans.last_mut().unwrap().work.push(SlotWork { slot: SlotId(slot), count, sample, blocks });
        self
    }

    fn decode(&mut self, slots: &[u32]) -> &mut Self {
        self.step();
        slots.iter().for_each(|slot| {
            self.work(*slot, 1);
        });
        self
    }
}

fn random(seed: u64) -> ResolvedSampling {
    ResolvedSampling { temperature: 1.3, seed, ..ResolvedSampling::greedy() }
}

fn penalised() -> ResolvedSampling {
    ResolvedSampling { repetition_penalty: 1.3, frequency_penalty: 0.2, logprobs: Some(1), ..random(5) }
}

fn prompt(family: &Family, tokens: usize) -> Vec<u32> {
    let text = family.cases.iter().find(|case| case.media.is_empty()).unwrap();
    text.ids.iter().copied().cycle().take(tokens).collect()
}

/// Greedy and random sequences, a prompt in chunks, a release and reopening while a token is on its way, penalties, a plan without
/// work. Ends with the random sequence of slot 1 alone.
fn mixed(family: &Family) -> Script {
    let greedy = ResolvedSampling::greedy;
    let mut script = Script::default();
    script.step().open(0, &prompt(family, 12), &[], greedy()).open(1, &prompt(family, 9), &[], random(7));
    script.work(0, 50).work(1, 50);
    script.decode(&[0, 1]).open(2, &prompt(family, 23), &[], greedy()).work(2, 10);
    script.decode(&[1, 0]).work(2, 10);
    script.decode(&[0, 1]).work(2, 10);
    script.decode(&[2, 1, 0]);
    script.step().release(1).open(1, &prompt(family, 7), &[], random(8)).work(0, 1).work(1, 50).work(2, 1);
    script.decode(&[0, 1, 2]).open(3, &prompt(family, 11), &[], penalised()).work(3, 50);
    script.decode(&[3, 0, 2, 1]);
    script.decode(&[3, 0, 2, 1]);
    script.step().release(0).work(1, 1).work(2, 1).work(3, 1);
    script.step().release(3).work(2, 1).work(1, 1);
    script.decode(&[2, 1]);
    script.step().release(2);
    script.decode(&[1]);
    script.decode(&[1]);
    script
}

fn engine<B: Backend + 'static>(family: &Family, backend: B) -> Engine<B> {
    let options = LoadOptions { keep_logits: false, ..options(Dtype::F32) };
    let model = models::load(Checkpoint::open(&family.dir).unwrap(), &backend).unwrap();
    Engine::new(backend, model, "fixture".into(), &options).unwrap()
}

fn cpu() -> CpuBackend {
    CpuBackend::new(candle_core::DType::F32).unwrap()
}

fn slow(no_number: Option<(usize, usize)>) -> MutantBackend<CpuBackend> {
    MutantBackend::new(cpu(), Fault::Slow { no_number })
}

/// Each step when the one before has ended.
fn one_by_one(mut engine: impl StepEngine, family: &mut Family, plans: &[StepPlan]) -> Vec<StepOutput> {
    plans.iter().map(|plan| engine.step(plan, family)).collect()
}

/// Each step behind one that is under way; `polite` asks whether that makes sense, as the device thread does.
fn two_deep(mut engine: impl StepEngine, family: &mut Family, plans: &[StepPlan], polite: bool) -> Vec<StepOutput> {
    let (mut outputs, mut under_way) = (Vec::new(), 0);
    for plan in plans {
        while under_way == 2 || (polite && under_way > 0 && engine.must_wait(plan)) {
            outputs.push(engine.collect().unwrap().output);
            under_way -= 1;
        }
        engine.launch(plan, family);
        under_way += 1;
    }
    outputs.extend(std::iter::from_fn(|| engine.collect()).map(|collected| collected.output));
    outputs
}

fn tokens_of(outputs: &[StepOutput], slot: u32, from_step: u64) -> Vec<u32> {
    let later = outputs.iter().filter(|output| output.step >= from_step);
    later.flat_map(|output| &output.tokens).filter(|token| token.slot.0 == slot).map(|token| token.token).collect()
}

#[test]
fn outputs_are_those_of_an_engine_that_waits() {
    for name in ["qwen3", "qwen3_vl", "qwen3_moe", "glm4_moe_lite"] {
        let mut family = Family::open(name);
        let family = &mut family;
        let mut script = mixed(family);
        // The sequence in slot 1 was opened in step 6. It is preempted when its last token is on its way, and taken up again.
        let before = one_by_one(engine(family, cpu()), family, &script.plans);
        let mut answer = tokens_of(&before, 1, 6);
        let lost = answer.pop().unwrap();
        script.step().release(1).open(4, &prompt(family, 7), &answer, random(8)).work(4, 4);
        script.decode(&[]).work(4, 50);
        script.decode(&[4]);
        script.decode(&[4]);

        let expected = one_by_one(engine(family, cpu()), family, &script.plans);
        assert_eq!(expected.iter().map(|output| output.tokens.len()).sum::<usize>(), 39, "{name}");
        assert!(expected.iter().all(|output| output.broken.is_none() && output.failed.is_empty()));
        assert_eq!(tokens_of(&expected, 4, 0)[0], lost, "{name}: a resumed answer");
        for polite in [true, false] {
            assert_eq!(two_deep(engine(family, cpu()), family, &script.plans, polite), expected, "{name}");
            assert_eq!(two_deep(engine(family, slow(None)), family, &script.plans, polite), expected, "{name}");
        }
        assert_eq!(one_by_one(engine(family, slow(None)), family, &script.plans), expected, "{name}");
    }
}

#[test]
fn a_row_that_is_no_number_ends_its_sequence_and_what_ran_ahead_is_dropped() {
    let mut family = Family::open("qwen3");
    let family = &mut family;
    let mut script = Script::default();
    let greedy = ResolvedSampling::greedy;
    script.step().open(0, &prompt(family, 12), &[], greedy()).open(1, &prompt(family, 9), &[], random(7));
    script.work(0, 50).work(1, 50);
    // Row 1 of the third step fails; the scheduler knows after two more plans.
    (0..4).for_each(|_| {
        script.decode(&[0, 1]);
    });
    script.step().release(1).open(1, &prompt(family, 9), &[], random(7)).work(1, 50).work(0, 1);
    script.decode(&[0, 1]);
    let expected = one_by_one(engine(family, slow(Some((2, 1)))), family, &script.plans);
    let codes =
        |output: &StepOutput| output.failed.iter().map(|(slot, error)| (slot.0, error.code)).collect::<Vec<_>>();
    let failed: Vec<_> = expected.iter().map(codes).collect();
    let nothing = Vec::new;
    assert_eq!(
        failed,
        [nothing(), nothing(), vec![(1, ErrorCode::NotFinite)], nothing(), nothing(), nothing(), nothing()]
    );
    assert_eq!(expected.iter().map(|output| output.tokens.len()).collect::<Vec<_>>(), [2, 2, 1, 1, 1, 2, 2]);
    let got = two_deep(engine(family, slow(Some((2, 1)))), family, &script.plans, true);
    assert_eq!(got, expected);
    // The same prompt and seed in the slot's next sequence.
    assert_eq!(tokens_of(&got, 1, 6)[..2], tokens_of(&got, 1, 0)[..2]);
}

#[test]
fn a_late_failure_concerns_no_other_sequence_in_the_slot() {
    let mut family = Family::open("qwen3");
    let family = &mut family;
    let (mut reopened, mut hosts) = (Script::default(), Script::default());
    for script in [&mut reopened, &mut hosts] {
        script.step().open(0, &prompt(family, 12), &[], ResolvedSampling::greedy());
        script.open(1, &prompt(family, 9), &[], random(7)).work(0, 50).work(1, 50);
        script.decode(&[0, 1]);
    }
    // The failed row's slot has another sequence before anyone knows, or the next step is drawn by the host.
    reopened.step().release(1).open(1, &prompt(family, 25), &[], random(9)).work(1, 8).work(0, 1);
    reopened.decode(&[0]).work(1, 50);
    reopened.decode(&[0, 1]);
    hosts.decode(&[0, 1]).open(2, &prompt(family, 10), &[], penalised()).work(2, 50);
    hosts.decode(&[1, 2, 0]);
    for (script, drawn) in [(reopened, [2, 1, 1, 2, 2].as_slice()), (hosts, &[2, 1, 2, 2])] {
        let expected = one_by_one(engine(family, slow(Some((1, 1)))), family, &script.plans);
        assert_eq!(expected.iter().map(|output| output.tokens.len()).collect::<Vec<_>>(), drawn);
        assert_eq!(expected[1].failed.len(), 1);
        for polite in [true, false] {
            assert_eq!(two_deep(engine(family, slow(Some((1, 1)))), family, &script.plans, polite), expected);
        }
    }
    // A token of the sequence before comes when the prompt behind it is half computed.
    let mut script = Script::default();
    script.step().open(1, &prompt(family, 9), &[], random(7)).work(1, 50);
    script.step().release(1).open(1, &prompt(family, 25), &[], random(9)).work(1, 6);
    script.step().work(1, 50);
    script.decode(&[1]);
    let expected = one_by_one(engine(family, slow(None)), family, &script.plans);
    assert_eq!(two_deep(engine(family, slow(None)), family, &script.plans, true), expected);
}

#[test]
fn a_plan_that_contradicts_the_engine_loses_no_output_before_it() {
    let mut family = Family::open("qwen3");
    let mut script = Script::default();
    script.step().open(0, &prompt(&family, 12), &[], ResolvedSampling::greedy()).work(0, 50);
    script.decode(&[0]);
    let mut wrong = script.plans[1].clone();
    wrong.work[0].slot = SlotId(3);
    let mut engine = engine(&family, slow(None));
    engine.launch(&script.plans[0], &mut family);
    assert!(!engine.has_ended() && !engine.must_wait(&wrong));
    engine.launch(&wrong, &mut family);
    let (first, second) = (engine.collect().unwrap().output, engine.collect().unwrap().output);
    assert_eq!((first.tokens.len(), first.broken), (1, None));
    assert!(second.broken.unwrap().contains("slot 3, not open"));
    assert!(engine.collect().is_none() && engine.fault().is_none());
    // A reset with a step under way forgets it.
    engine.reset();
    engine.launch(&script.plans[0], &mut family);
    engine.reset();
    assert!(engine.collect().is_none());
    assert_eq!(engine.step(&script.plans[0], &mut family).tokens, first.tokens);
}

#[test]
fn plans_whose_draws_are_the_hosts_wait() {
    let mut family = Family::open("qwen3");
    let mut script = Script::default();
    script.step().open(0, &prompt(&family, 12), &[], ResolvedSampling::greedy()).work(0, 50);
    script.decode(&[0]).open(1, &prompt(&family, 9), &[], penalised()).work(1, 50);
    script.decode(&[0]);
    let mut engine = engine(&family, slow(None));
    engine.launch(&script.plans[0], &mut family);
    assert!(engine.must_wait(&script.plans[1]), "a sequence with penalties is opened");
    assert!(!engine.must_wait(&script.plans[2]), "it is not in this plan");
    engine.collect().unwrap();
    assert!(!engine.must_wait(&script.plans[1]), "nothing is under way");
    engine.launch(&script.plans[1], &mut family);
    assert!(engine.has_ended(), "the host has drawn");
}

#[test]
fn generating_runs_ahead_and_ends_where_it_would_end() {
    let mut family = Family::open("qwen3");
    let family = &mut family;
    let request = |tokens, sampling, max_tokens| Request {
        prompt: prompt(family, tokens),
        answer: Vec::new(),
        media: Vec::new(),
        sampling,
        max_tokens,
        stop_token_ids: Vec::new(),
    };
    let mut requests =
        vec![request(12, ResolvedSampling::greedy(), 9), request(31, random(3), 14), request(5, random(4), 1)];
    let options = GenerateOptions { chunk_tokens: Some(8), ..GenerateOptions::default() };
    let mut run = |engine: &mut dyn StepEngine, requests: &[Request]| {
        generate(engine, requests, &options, family, &mut |_, _| {}).unwrap()
    };
    let family = Family::open("qwen3");
    let (mut waits, mut ahead) = (engine(&family, cpu()), engine(&family, slow(None)));
    let whole = run(&mut waits, &requests);
    assert_eq!(whole.iter().map(|result| result.tokens.len()).collect::<Vec<_>>(), [9, 14, 1]);
    assert_eq!(run(&mut ahead, &requests), whole);
    // A stop in the middle is seen when the token behind it is under way.
    requests[1].stop_token_ids.push(whole[1].tokens[6]);
    let stopped: Vec<Generated> = run(&mut ahead, &requests);
    let end = 1 + whole[1].tokens.iter().position(|token| *token == whole[1].tokens[6]).unwrap();
    assert_eq!((stopped[1].finish, &stopped[1].tokens[..]), (Some(FinishReason::Stop), &whole[1].tokens[..end]));
    assert_eq!(run(&mut waits, &requests), stopped);
}
