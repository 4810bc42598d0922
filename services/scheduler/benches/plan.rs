//! Cost of the policy: one step planned and its output applied, with a given number of sequences running and waiting.
//! `tests/bench/callgrind.py` counts this program's instructions; run alone it prints times and plan bytes.
//!
//!     cargo bench -p millrace-scheduler --bench plan -- --running 256 --waiting 1000 --steps 64 --short-of slots
//!
//! `--short-of blocks` leaves slots free: then the head of the queue is weighed against the pool in every step.

// A bench may end in a panic, its product is what it prints, and it has a clock of its own.
#![allow(clippy::expect_used, clippy::print_stdout, clippy::disallowed_methods)]

use std::time::{Duration, Instant};

use millrace_protocol::engine::EngineSpec;
use millrace_protocol::plan::StepPlan;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::step::SlotToken;
use millrace_protocol::{ActorId, JobId, ModelName};
use millrace_scheduler::policy::{Events, Limits, NewSequence, Plan, Planner};

const BLOCK_TOKENS: u32 = 16;
/// Long enough to stand for a prompt, short enough that 1,024 of them are set up quickly.
const PROMPT_TOKENS: usize = 100;
const RUN_AHEAD: usize = 2;

struct Load {
    running: usize,
    waiting: usize,
    steps: usize,
    free_slots: usize,
}

impl Load {
    fn from_args() -> Self {
        let args: Vec<String> = std::env::args().collect();
        let number = |name: &str, default: usize| {
            let place = args.iter().position(|arg| arg == name);
            place.and_then(|place| args.get(place + 1)).map_or(default, |text| text.parse().expect("a number"))
        };
        let short_of_blocks = args.iter().any(|arg| arg == "blocks");
        Self {
            running: number("--running", 256),
            waiting: number("--waiting", 1_000),
            steps: number("--steps", 64),
            free_slots: if short_of_blocks { 64 } else { 0 },
        }
    }
}

fn sequence(index: usize, steps: usize) -> NewSequence {
    NewSequence {
        job: JobId::new(format!("job-{index}")).expect("a name"),
        // Different prompts: nothing is shared.
        prompt: (0..PROMPT_TOKENS).map(|n| (index * PROMPT_TOKENS + n) as u32).collect(),
        answer: vec![],
        media: vec![],
        sampling: ResolvedSampling::greedy(),
        max_tokens: steps as u32,
        stop_token_ids: vec![2],
        may_stop_on_text: false,
        priority: 5,
        tenant: format!("tenant-{}", index % 7),
        deadline: None,
    }
}

/// The executor's answer: one token for each draw.
fn answer(plan: &Plan, step: usize) -> Vec<SlotToken> {
    let draws = plan.work.iter().filter(|work| work.sample);
    draws.map(|work| SlotToken { slot: work.slot, token: 10 + step as u32 % 1_000, logprobs: None }).collect()
}

/// What is counted. Its name is what callgrind looks for.
#[inline(never)]
fn measured_step(planner: &mut Planner, tokens: Vec<SlotToken>, now: Duration, events: &mut Events) -> Option<Plan> {
    planner.apply(tokens, vec![], Duration::from_millis(11), events).expect("an output that fits");
    planner.plan(now, events)
}

fn plan_bytes(plan: Plan, step: u64) -> usize {
    let scheduler = ActorId::new("scheduler-4f1c2a9b7d").expect("a name");
    let plan = StepPlan {
        scheduler,
        session: 1,
        step,
        release: plan.release,
        copies: plan.copies,
        open: plan.open,
        work: plan.work,
    };
    postcard::to_stdvec(&plan).expect("plans can be written").len()
}

fn main() {
    let load = Load::from_args();
    let length = PROMPT_TOKENS + load.steps + 64;
    let table = length.div_ceil(BLOCK_TOKENS as usize);
    // What runs fits. With slots to spare, the watermark keeps the pool's last blocks from those that wait.
    let spare = if load.free_slots > 0 { 4 } else { 8 + load.running };
    let spec = EngineSpec {
        model: ModelName::new("m").expect("a name"),
        weights_hash: "w".into(),
        blocks: (load.running * table + spare) as u32,
        block_tokens: BLOCK_TOKENS,
        slots: (load.running + load.free_slots) as u32,
        step_tokens: 8_192,
        step_patches: 64,
        max_tokens: 32_768,
        vocab: 151_936,
        device: "bench".into(),
    };
    let limits = Limits {
        max_running: load.running + load.free_slots,
        step_tokens: 8_192,
        run_ahead: RUN_AHEAD,
        watermark_blocks: 4 + if load.free_slots > 0 { load.running * (table - PROMPT_TOKENS / 16 - 1) } else { 0 },
        ..Limits::default()
    };
    let mut planner = Planner::new(limits);
    let mut events = Events::new();
    let mut now = Duration::from_secs(1);
    planner.attach(&spec, now, &mut events);
    for index in 0..load.running + load.waiting {
        planner.submit(sequence(index, load.steps + 64), now, &mut events);
    }
    let mut out = std::collections::VecDeque::new();
    while let Some(plan) = planner.plan(now, &mut events) {
        out.push_back(answer(&plan, 0));
    }
    let (mut step, mut elapsed, mut measured, mut bytes) = (0, Duration::ZERO, 0, 0);
    while measured < load.steps {
        step += 1;
        now += Duration::from_millis(11);
        let tokens = out.pop_front().expect("a plan is out");
        // Until every prompt is computed, steps are not those that are to be measured.
        let warm = planner.counts().running == load.running && step > 16;
        let plan = if warm {
            let start = Instant::now();
            let plan = measured_step(&mut planner, tokens, now, &mut events);
            elapsed += start.elapsed();
            plan.expect("there is always work")
        } else {
            planner.apply(tokens, vec![], Duration::from_millis(11), &mut events).expect("an output that fits");
            planner.plan(now, &mut events).expect("there is always work")
        };
        events.clear();
        out.push_back(answer(&plan, step));
        if warm {
            assert_eq!(plan.work.len(), load.running, "every running sequence decodes in a measured step");
            measured += 1;
            bytes += plan_bytes(plan, step as u64);
        }
    }
    planner.check().expect("books that balance");
    let counts = planner.counts();
    assert_eq!((counts.running, counts.waiting), (load.running, load.waiting));
    let per_sequence = bytes as f64 / (measured * load.running) as f64;
    println!(
        "running {} waiting {} steps {measured} ns_per_step {} plan_bytes_per_sequence {per_sequence:.2}",
        load.running,
        load.waiting,
        elapsed.as_nanos() / measured as u128,
    );
}
