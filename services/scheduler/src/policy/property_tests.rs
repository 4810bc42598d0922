//! Properties of planning under random arrivals, cancellations, crashes and pools that are too small for the load.

use std::collections::HashMap;
use std::time::Duration;

use millrace_protocol::engine::EngineCosts;
use millrace_protocol::plan::StepPlan;
use millrace_protocol::{ActorId, ErrorCode, JobId};
use proptest::prelude::*;

use super::planner::{Blame, Event, Events, Limits, Plan, Planner};
use super::scripted::{Scripted, drawn, job, spec};
use super::sequence::{NewSequence, SeqId};

#[derive(Debug, Clone)]
struct Arrival {
    at_step: usize,
    prompt: usize,
    shared: usize,
    max_tokens: u32,
    ends_at: usize,
    priority: u8,
    tenant: u8,
    cancel_after: Option<usize>,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    (
        0_usize..40,
        1_usize..40,
        0_usize..40,
        1_u32..24,
        0_usize..40,
        0_u8..10,
        0_u8..3,
        prop::option::weighted(0.1, 0_usize..30),
    )
        .prop_map(|(at_step, prompt, shared, max_tokens, ends_at, priority, tenant, cancel_after)| Arrival {
            at_step,
            prompt,
            shared,
            max_tokens,
            ends_at,
            priority,
            tenant,
            cancel_after,
        })
}

#[derive(Debug, Clone)]
struct World {
    arrivals: Vec<Arrival>,
    blocks: u32,
    slots: u32,
    step_tokens: usize,
    run_ahead: usize,
    cache: bool,
    host_blocks: u32,
    plan_bytes: usize,
    crash_at: Option<usize>,
}

impl World {
    fn costs(&self) -> EngineCosts {
        EngineCosts { token_ns: 1_000, swap_out_ns: 1, swap_in_ns: 1, host_blocks: self.host_blocks }
    }
}

fn world() -> impl Strategy<Value = World> {
    let arrivals = prop::collection::vec(arrival(), 1..14);
    let shape = (
        8_u32..40,
        1_u32..6,
        1_usize..48,
        1_usize..4,
        any::<bool>(),
        0_u32..12,
        1_500_usize..4_000,
        prop::option::weighted(0.3, 0_usize..60),
    );
    (arrivals, shape).prop_map(
        |(arrivals, (blocks, slots, step_tokens, run_ahead, cache, host_blocks, plan_bytes, crash_at))| World {
            arrivals,
            blocks,
            slots,
            step_tokens,
            run_ahead,
            cache,
            host_blocks,
            plan_bytes,
            crash_at,
        },
    )
}

fn name(index: usize) -> String {
    format!("job-{index}")
}

fn sequence(index: usize, arrival: &Arrival) -> NewSequence {
    let shared = arrival.shared.min(arrival.prompt);
    let own = (shared..arrival.prompt).map(|n| (index * 100 + n) as u32);
    NewSequence {
        priority: arrival.priority,
        tenant: arrival.tenant.to_string(),
        ..job(&name(index), (0..shared as u32).chain(own), arrival.max_tokens)
    }
}

fn executor(world: &World) -> Scripted {
    let mut executor = Scripted::new(spec(world.blocks, world.slots));
    executor.ends = world.arrivals.iter().enumerate().map(|(index, a)| (name(index), a.ends_at)).collect();
    executor
}

/// What each job was given, and how it ended.
#[derive(Default)]
struct Record {
    answer: Vec<u32>,
    end: Option<&'static str>,
}

fn note(records: &mut HashMap<SeqId, Record>, events: &mut Events) -> Result<(), TestCaseError> {
    for (id, event) in events.drain(..) {
        let record = records.entry(id).or_default();
        prop_assert!(record.end.is_none(), "{event:?} after the end");
        match event {
            Event::Token { token, .. } => record.answer.push(token),
            Event::Finished { .. } => record.end = Some("finished"),
            Event::Refused(error) if error.code == ErrorCode::TooLarge => record.end = Some("too large"),
            Event::Refused(_) => record.end = Some("refused"),
            Event::Expired | Event::Failed(_) => prop_assert!(false, "{event:?}"),
            Event::Admitted { .. } | Event::Preempted => {}
        }
    }
    Ok(())
}

/// Size of the message that carries a plan, its head as long as it can be.
fn encoded_bytes(plan: &Plan) -> usize {
    let whole = StepPlan {
        scheduler: ActorId::new("s".repeat(128)).unwrap(),
        session: u64::MAX,
        step: u64::MAX,
        release: plan.release.clone(),
        copies: plan.copies.clone(),
        open: plan.open.clone(),
        work: plan.work.clone(),
    };
    postcard::to_stdvec(&whole).unwrap().len()
}

fn live(world: &World) -> Result<(), TestCaseError> {
    let limits = Limits {
        step_tokens: world.step_tokens,
        run_ahead: world.run_ahead,
        prefix_cache: world.cache,
        plan_bytes: world.plan_bytes,
        ageing: Duration::from_millis(200),
        ..Limits::default()
    };
    let mut planner = Planner::new(limits);
    let mut records: HashMap<SeqId, Record> = HashMap::new();
    let mut ids: HashMap<usize, SeqId> = HashMap::new();
    let mut cancelled = Vec::new();
    let mut events = Events::new();
    let mut engine = executor(world);
    planner.attach(&spec(world.blocks, world.slots), Duration::ZERO, &mut events);
    planner.swap_by(&world.costs());
    for step in 0.. {
        prop_assert!(step < 5_000, "no end in sight: {:?}", planner.counts());
        let now = Duration::from_millis(step as u64 * 10);
        for (index, arrival) in world.arrivals.iter().enumerate() {
            if arrival.at_step == step {
                ids.insert(index, planner.submit(sequence(index, arrival), now, &mut events));
            }
            if arrival.cancel_after.is_some_and(|after| arrival.at_step + after == step)
                && planner.remove(ids[&index]).is_some()
            {
                cancelled.push(index);
            }
        }
        if world.crash_at == Some(step) {
            planner.detach(Blame::Nobody, now, &mut events);
            engine = executor(world);
            planner.attach(&spec(world.blocks, world.slots), now, &mut events);
            planner.swap_by(&world.costs());
        }
        while let Some(plan) = planner.plan(now, &mut events) {
            prop_assert_eq!(planner.check(), Ok(()));
            prop_assert!(encoded_bytes(&plan) <= world.plan_bytes);
            engine.send(plan);
        }
        if let Some((tokens, busy)) = engine.step() {
            prop_assert!(engine.last_tokens <= world.step_tokens);
            planner.apply(tokens, vec![], busy, &mut events).map_err(|e| TestCaseError::fail(e.to_string()))?;
        }
        prop_assert_eq!(planner.check(), Ok(()));
        note(&mut records, &mut events)?;
        let counts = planner.counts();
        if step > 80 && counts.waiting + counts.running + counts.outstanding == 0 {
            prop_assert_eq!(counts.free_blocks, counts.total_blocks);
            break;
        }
    }
    for (index, arrival) in world.arrivals.iter().enumerate() {
        let record = records.remove(&ids[&index]).unwrap_or_default();
        let job = JobId::new(name(index)).unwrap();
        let length = arrival.ends_at.min(arrival.max_tokens as usize);
        let expected: Vec<u32> = (0..length).map(|n| drawn(&job, n, None)).collect();
        if cancelled.contains(&index) {
            prop_assert!(record.end.is_none() && expected.starts_with(&record.answer));
        } else if record.end == Some("too large") {
            // 512 bytes and 19 for each token at most, beside the rest of a plan.
            let tokens = arrival.prompt + arrival.max_tokens as usize;
            prop_assert!(512 + 19 * tokens + 1_000 > world.plan_bytes && record.answer.is_empty());
        } else if record.end == Some("refused") {
            let most = (arrival.prompt + arrival.max_tokens as usize - 1).div_ceil(4);
            prop_assert!(most > world.blocks as usize && record.answer.is_empty());
        } else {
            prop_assert_eq!((record.end, record.answer), (Some("finished"), expected));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8_000))]

    /// Budgets hold, blocks conserve, everyone ends exactly once with exactly its own answer, whatever happens.
    #[test]
    fn every_sequence_ends_with_its_own_answer(world in world()) {
        live(&world)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    /// Within one priority and tenant nobody is admitted before an older one, as long as nobody ages or is preempted.
    #[test]
    fn equals_are_admitted_in_order(
        arrivals in prop::collection::vec((0_usize..20, 1_usize..20, 1_u32..10, 0_u8..3), 1..16),
        slots in 1_u32..4,
    ) {
        let limits = Limits { ageing: Duration::ZERO, step_tokens: 24, ..Limits::default() };
        let mut planner = Planner::new(limits);
        let mut events = Events::new();
        // Room for all: a preemption would change the order for good reason.
        planner.attach(&spec(400, slots), Duration::ZERO, &mut events);
        let mut engine = Scripted::new(spec(400, slots));
        let mut priority_of = HashMap::new();
        let mut admitted: HashMap<u8, Vec<SeqId>> = HashMap::new();
        let mut submitted: HashMap<u8, Vec<SeqId>> = HashMap::new();
        for step in 0..400 {
            let now = Duration::from_millis(step as u64);
            for (index, (_, prompt, max_tokens, priority)) in arrivals.iter().enumerate().filter(|(_, a)| a.0 == step) {
                let new = NewSequence { priority: *priority, ..job(&name(index), 0..*prompt as u32, *max_tokens) };
                let id = planner.submit(new, now, &mut events);
                priority_of.insert(id, *priority);
                submitted.entry(*priority).or_default().push(id);
            }
            while let Some(plan) = planner.plan(now, &mut events) {
                engine.send(plan);
            }
            if let Some((tokens, busy)) = engine.step() {
                planner.apply(tokens, vec![], busy, &mut events).unwrap();
            }
            for (id, event) in events.drain(..) {
                if matches!(event, Event::Admitted { again: false, .. }) {
                    admitted.entry(priority_of[&id]).or_default().push(id);
                }
            }
        }
        prop_assert_eq!(admitted, submitted);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Whatever comes, and however much it is preferred, cannot keep the lowest priority out for ever.
    #[test]
    fn the_lowest_priority_is_served_under_any_arrivals(
        prompt in 1_usize..30,
        slots in 1_u32..4,
        blocks in 12_u32..40,
        pattern in prop::collection::vec(prop::collection::vec((1_u8..10, 0_u8..3, 1_usize..20, 1_u32..9), 0..4), 1..12),
    ) {
        let tenant_weights = [("0".to_owned(), 10), ("1".to_owned(), 3)].into();
        let ageing = Duration::from_millis(100);
        let mut planner = Planner::new(Limits { ageing, tenant_weights, step_tokens: 16, ..Limits::default() });
        let mut events = Events::new();
        planner.attach(&spec(blocks, slots), Duration::ZERO, &mut events);
        let mut engine = Scripted::new(spec(blocks, slots));
        let new = NewSequence { priority: 0, tenant: "humble".into(), ..job("humble", 0..prompt as u32, 4) };
        let humble = planner.submit(new, Duration::ZERO, &mut events);
        for step in 0..3_000_usize {
            let now = Duration::from_millis(step as u64 * 10);
            for (n, (priority, tenant, prompt, max_tokens)) in pattern[step % pattern.len()].iter().enumerate() {
                let prompt = (0..*prompt as u32).map(|token| token * u32::from(*priority));
                let new = job(&format!("s{step}-{n}"), prompt, *max_tokens);
                planner.submit(NewSequence { priority: *priority, tenant: tenant.to_string(), ..new }, now, &mut events);
            }
            while let Some(plan) = planner.plan(now, &mut events) {
                engine.send(plan);
            }
            let Some((tokens, busy)) = engine.step() else { continue };
            planner.apply(tokens, vec![], busy, &mut events).unwrap();
            if planner.sequence(humble).is_none() {
                return Ok(());
            }
        }
        prop_assert!(false, "still there: {:?}", planner.sequence(humble).map(|s| s.rank));
    }
}
