//! Exact cases of planning.

use std::time::Duration;

use millrace_protocol::ready::MediaItem;
use millrace_protocol::{ActorId, ErrorCode, FinishReason, PageDtype, PageRef, SlotId};

use super::planner::{Blame, Event, Events, Limits, Plan, Planner};
use super::scripted::{Scripted, drawn, job, spec};
use super::sequence::{NewSequence, SeqId};

pub(super) const NOW: Duration = Duration::from_secs(1);

pub(super) fn planner(blocks: u32, slots: u32, limits: Limits) -> Planner {
    let mut planner = Planner::new(limits);
    planner.attach(&spec(blocks, slots), NOW, &mut Events::new());
    planner
}

pub(super) fn limits(step_tokens: usize) -> Limits {
    Limits { step_tokens, max_running: 8, ..Limits::default() }
}

pub(super) fn submit(planner: &mut Planner, new: NewSequence) -> SeqId {
    let mut events = Events::new();
    let id = planner.submit(new, NOW, &mut events);
    assert_eq!(events, []);
    id
}

pub(super) fn plan(planner: &mut Planner) -> Plan {
    let plan = planner.plan(NOW, &mut Events::new()).expect("a plan");
    planner.check().unwrap();
    plan
}

/// (slot, count, sample, new blocks) of each piece of work.
pub(super) fn table(plan: &Plan) -> Vec<(u32, u32, bool, usize)> {
    plan.work.iter().map(|work| (work.slot.0, work.count, work.sample, work.blocks.len())).collect()
}

pub(super) fn answer(planner: &mut Planner, executor: &mut Scripted) -> Events {
    let mut events = Events::new();
    let (tokens, busy) = executor.step().expect("a plan is out");
    planner.apply(tokens, vec![], busy, &mut events).unwrap();
    planner.check().unwrap();
    events
}

/// Runs until nothing is left to do; all events.
pub(super) fn run(planner: &mut Planner, executor: &mut Scripted) -> Events {
    let mut events = Events::new();
    loop {
        while let Some(plan) = planner.plan(NOW, &mut events) {
            executor.send(plan);
        }
        if !executor.busy() {
            return events;
        }
        events.extend(answer(planner, executor));
    }
}

/// Runs until `count` sequences have ended; they, in this order.
pub(super) fn first_to_end(planner: &mut Planner, executor: &mut Scripted, count: usize) -> Vec<SeqId> {
    let (mut events, mut ended) = (Events::new(), Vec::new());
    while ended.len() < count {
        while let Some(plan) = planner.plan(NOW, &mut events) {
            executor.send(plan);
        }
        events.extend(answer(planner, executor));
        ended.extend(events.drain(..).filter(|(_, event)| matches!(event, Event::Finished { .. })).map(|(id, _)| id));
    }
    ended
}

pub(super) fn answer_of(id: SeqId, events: &Events) -> Vec<u32> {
    let token = |(of, event): &(SeqId, Event)| match event {
        Event::Token { token, .. } if *of == id => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

/// What the executor draws for a job, token by token.
pub(super) fn drawn_answer(name: &str, length: usize) -> Vec<u32> {
    let name = millrace_protocol::JobId::new(name).unwrap();
    (0..length).map(|n| drawn(&name, n, None)).collect()
}

#[test]
fn a_long_prompt_is_chunked_beside_decodes() {
    let mut planner = planner(64, 4, limits(8));
    let mut executor = Scripted::new(spec(64, 4));
    submit(&mut planner, job("short", 0..3, 9));
    submit(&mut planner, job("long", 100..120, 9));
    let first = plan(&mut planner);
    assert_eq!(table(&first), [(0, 3, true, 1), (1, 5, false, 2)]);
    let second = plan(&mut planner);
    assert_eq!(table(&second), [(0, 1, true, 0), (1, 7, false, 1)]);
    assert!(planner.plan(NOW, &mut Events::new()).is_none(), "two plans are out");
    executor.send(first);
    executor.send(second);
    assert_eq!(answer(&mut planner, &mut executor).len(), 1);
    assert_eq!(table(&plan(&mut planner)), [(0, 1, true, 1), (1, 7, false, 2)]);
    answer(&mut planner, &mut executor);
    assert_eq!(table(&plan(&mut planner)), [(0, 1, true, 0), (1, 1, true, 0)]);
}

#[test]
fn a_newcomer_joins_at_the_next_step() {
    let mut planner = planner(64, 4, limits(8));
    submit(&mut planner, job("a", 0..3, 9));
    plan(&mut planner);
    submit(&mut planner, job("b", 0..4, 9));
    let next = plan(&mut planner);
    assert_eq!(table(&next), [(0, 1, true, 0), (1, 4, true, 1)]);
    assert_eq!(next.open.len(), 1);
}

#[test]
fn nothing_is_planned_beyond_the_last_token() {
    let mut planner = planner(64, 4, limits(8));
    let mut executor = Scripted::new(spec(64, 4));
    let id = submit(&mut planner, job("a", 0..3, 1));
    executor.send(plan(&mut planner));
    assert!(planner.plan(NOW, &mut Events::new()).is_none());
    let events = answer(&mut planner, &mut executor);
    assert_eq!(events[1], (id, Event::Finished { reason: FinishReason::Length, hidden_tokens: 0 }));
    assert!(planner.sequence(id).is_none());
}

#[test]
fn a_stop_found_late_discards_what_ran_ahead() {
    let mut planner = planner(64, 4, limits(8));
    let mut executor = Scripted::new(spec(64, 4));
    executor.ends.insert("a".into(), 1);
    let id = submit(&mut planner, job("a", 0..3, 50));
    let events = run(&mut planner, &mut executor);
    assert_eq!(answer_of(id, &events).len(), 1);
    assert_eq!(events.last(), Some(&(id, Event::Finished { reason: FinishReason::Stop, hidden_tokens: 1 })));
    submit(&mut planner, job("b", 0..3, 1));
    assert_eq!(plan(&mut planner).release, [SlotId(0)]);
}

#[test]
fn a_resumed_answer_goes_on_behind_what_was_shown() {
    let mut planner = planner(64, 4, limits(64));
    let mut executor = Scripted::new(spec(64, 4));
    let whole = submit(&mut planner, job("a", 0..5, 12));
    let expected = answer_of(whole, &run(&mut planner, &mut executor));
    let resumed = submit(&mut planner, NewSequence { answer: expected[..7].to_vec(), ..job("a", 0..5, 12) });
    assert_eq!(answer_of(resumed, &run(&mut planner, &mut executor)), expected[7..]);
    let mut events = Events::new();
    let done = planner.submit(NewSequence { answer: expected, ..job("a", 0..5, 12) }, NOW, &mut events);
    assert_eq!(events, [(done, Event::Finished { reason: FinishReason::Length, hidden_tokens: 0 })]);
}

#[test]
fn when_blocks_run_out_the_newest_waits_and_nothing_is_lost() {
    let mut planner = planner(10, 4, Limits { watermark_blocks: 0, ..limits(64) });
    let mut executor = Scripted::new(spec(10, 4));
    let ids: Vec<SeqId> = ["a", "b"].map(|name| submit(&mut planner, job(name, 0..12, 20))).to_vec();
    let events = run(&mut planner, &mut executor);
    for (id, name) in ids.iter().zip(["a", "b"]) {
        let name = millrace_protocol::JobId::new(name).unwrap();
        let expected: Vec<u32> = (0..20).map(|n| drawn(&name, n, None)).collect();
        assert_eq!(answer_of(*id, &events), expected);
    }
    assert!(events.contains(&(ids[1], Event::Preempted)) && !events.contains(&(ids[0], Event::Preempted)));
}

#[test]
fn equal_beginnings_are_computed_once() {
    let mut planner = planner(64, 4, limits(64));
    let mut executor = Scripted::new(spec(64, 4));
    submit(&mut planner, job("a", 0..20, 4));
    run(&mut planner, &mut executor);
    submit(&mut planner, job("b", (0..18).chain([7, 7]), 4));
    let next = plan(&mut planner);
    assert_eq!((next.open[0].cached_tokens, next.open[0].blocks.len(), table(&next)[0].1), (16, 4, 4));
    executor.send(next);
    submit(&mut planner, NewSequence { tenant: "other".into(), ..job("c", 0..20, 4) });
    assert_eq!(plan(&mut planner).open[0].cached_tokens, 0, "tenants share nothing");
}

#[test]
fn an_identical_prompt_still_computes_its_last_token() {
    let mut planner = planner(64, 4, limits(64));
    let mut executor = Scripted::new(spec(64, 4));
    submit(&mut planner, job("a", 0..16, 1));
    run(&mut planner, &mut executor);
    submit(&mut planner, job("b", 0..16, 1));
    assert_eq!(plan(&mut planner).open[0].cached_tokens, 12);
}

#[test]
fn a_high_priority_arrival_takes_a_slot_within_two_steps() {
    let mut planner = planner(64, 2, limits(64));
    let mut executor = Scripted::new(spec(64, 2));
    for name in ["a", "b"] {
        submit(&mut planner, NewSequence { priority: 1, ..job(name, 0..4, 40) });
    }
    executor.send(plan(&mut planner));
    executor.send(plan(&mut planner));
    let urgent = submit(&mut planner, NewSequence { priority: 9, ..job("urgent", 50..54, 3) });
    let same = submit(&mut planner, NewSequence { priority: 1, ..job("same", 60..64, 3) });
    answer(&mut planner, &mut executor);
    let mut events = Events::new();
    let next = planner.plan(NOW, &mut events).unwrap();
    assert_eq!(next.open[0].job.as_str(), "urgent");
    assert!(events.contains(&(urgent, Event::Admitted { cached_tokens: 0, again: false })));
    assert!(planner.sequence(same).unwrap().running().is_none(), "equals are not preempted");
}

#[test]
fn an_expired_or_hopeless_job_is_not_run() {
    let mut planner = planner(64, 2, limits(64));
    let mut executor = Scripted::new(spec(64, 2));
    submit(&mut planner, job("measure", 0..4, 3));
    run(&mut planner, &mut executor);
    let mut events = Events::new();
    let in_ms = |ms| Some(NOW + Duration::from_millis(ms));
    let exact = NewSequence { stop_token_ids: vec![], ..job("exact", 0..4, 1_00) };
    let hopeless = planner.submit(NewSequence { deadline: in_ms(100), ..exact }, NOW, &mut events);
    let hopeful = planner.submit(NewSequence { deadline: in_ms(100), ..job("b", 0..4, 100) }, NOW, &mut events);
    let next = planner.plan(NOW, &mut events).unwrap();
    assert_eq!(events[0], (hopeless, Event::Expired));
    assert_eq!(next.open[0].job.as_str(), "b");
    planner.expire(NOW + Duration::from_millis(100), &mut events);
    assert_eq!(events.last(), Some(&(hopeful, Event::Expired)));
    planner.check().unwrap();
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let mut planner = planner(4, 2, limits(64));
    let mut refuse = |new: NewSequence| {
        let mut events = Events::new();
        planner.submit(new, NOW, &mut events);
        match events.pop() {
            Some((_, Event::Refused(error))) => Some(error.code),
            _ => None,
        }
    };
    assert_eq!(refuse(job("pool", 0..10, 8)), Some(ErrorCode::ContextLength));
    assert_eq!(refuse(job("fits", 0..10, 7)), None);
    assert_eq!(refuse(job("model", 0..4_000, 97)), Some(ErrorCode::ContextLength));
    assert_eq!(refuse(job("empty", 0..0, 8)), Some(ErrorCode::NoPrompt));
}

#[test]
fn a_lost_engine_costs_nothing_but_time() {
    let mut planner = planner(64, 2, limits(8));
    let mut executor = Scripted::new(spec(64, 2));
    let id = submit(&mut planner, job("a", 0..10, 12));
    let mut events = Events::new();
    for _ in 0..4 {
        while let Some(plan) = planner.plan(NOW, &mut events) {
            executor.send(plan);
        }
        events.extend(answer(&mut planner, &mut executor));
    }
    planner.detach(Blame::Engine, NOW, &mut events);
    planner.check().unwrap();
    assert!(planner.plan(NOW, &mut events).is_none());
    planner.attach(&spec(32, 3), NOW, &mut events);
    events.extend(run(&mut planner, &mut Scripted::new(spec(32, 3))));
    let name = millrace_protocol::JobId::new("a").unwrap();
    assert_eq!(answer_of(id, &events), (0..12).map(|n| drawn(&name, n, None)).collect::<Vec<_>>());
}

#[test]
fn media_share_the_patch_budget() {
    let image = |start: u32, side: u32| MediaItem {
        start,
        tokens: side * side / 4,
        grid_h: side,
        grid_w: side,
        patches: PageRef {
            node: ActorId::new("n").unwrap(),
            page: 1,
            dtype: PageDtype::F32,
            shape: vec![],
            bytes: 0,
            hash: [start as u8; 16],
        },
        normalise: None,
    };
    let mut planner = planner(64, 4, limits(64));
    // 64 patches a step: the first two images fit together, the third waits, the last is larger than the budget.
    let media = vec![image(1, 4), image(6, 6), image(16, 4), image(20, 10)];
    submit(&mut planner, NewSequence { media, ..job("a", [5; 50], 3) });
    let counts: Vec<u32> = (0..2).map(|_| plan(&mut planner).work[0].count).collect();
    assert_eq!(counts, [16, 4]);
    let mut executor = Scripted::new(spec(64, 4));
    executor.ends.insert("a".into(), 0);
    let mut events = Events::new();
    planner.apply(vec![], vec![], NOW, &mut events).unwrap();
    assert_eq!(plan(&mut planner).work[0].count, 30);
}

#[test]
fn an_output_that_contradicts_its_plan_is_refused() {
    let mut planner = planner(64, 4, limits(64));
    submit(&mut planner, job("a", 0..3, 5));
    plan(&mut planner);
    assert!(planner.apply(vec![], vec![], NOW, &mut Events::new()).is_err());
    assert!(planner.apply(vec![], vec![], NOW, &mut Events::new()).is_err());
}

#[test]
fn a_failed_sequence_leaves_no_content_behind() {
    let mut planner = planner(64, 4, limits(8));
    let mut executor = Scripted::new(spec(64, 4));
    let id = submit(&mut planner, job("a", 0..12, 5));
    executor.send(plan(&mut planner));
    answer(&mut planner, &mut executor);
    assert_eq!(planner.counts().cached_blocks, 2);
    plan(&mut planner);
    let error = millrace_protocol::JobError::new(ErrorCode::NotFinite, "x");
    let mut events = Events::new();
    planner.apply(vec![], vec![(SlotId(0), error.clone())], NOW, &mut events).unwrap();
    assert_eq!(events, [(id, Event::Failed(error))]);
    assert_eq!((planner.counts().cached_blocks, planner.counts().free_blocks), (0, 64));
    planner.check().unwrap();
}

#[test]
fn only_the_job_that_brings_engines_down_is_poison() {
    let mut planner = planner(64, 4, limits(64));
    let mut events = Events::new();
    let ids: Vec<SeqId> = ["a", "poison", "b"].map(|name| submit(&mut planner, job(name, 0..6, 4))).to_vec();
    let mut engines = 1;
    let mut executor = Scripted::new(spec(64, 4));
    for _ in 0..100 {
        while let Some(plan) = planner.plan(NOW, &mut events) {
            executor.send(plan);
        }
        // The engine dies over any step that computes the poisonous job.
        if planner.sequence(ids[1]).is_some_and(|sequence| sequence.running().is_some()) {
            planner.detach(Blame::Engine, NOW, &mut events);
            planner.attach(&spec(64, 4), NOW, &mut events);
            executor = Scripted::new(spec(64, 4));
            engines += 1;
        } else if executor.busy() {
            events.extend(answer(&mut planner, &mut executor));
        }
    }
    let ends = |id: SeqId| events.iter().rev().find(|(of, _)| *of == id).map(|(_, event)| event.clone());
    assert!(matches!(ends(ids[1]), Some(Event::Failed(error)) if error.code == ErrorCode::Poison));
    for id in [ids[0], ids[2]] {
        assert_eq!(ends(id), Some(Event::Finished { reason: FinishReason::Length, hidden_tokens: 0 }));
    }
    assert_eq!(engines, 4);
}

#[test]
fn tenants_share_a_busy_engine_evenly() {
    let mut planner = planner(200, 2, limits(16));
    let mut executor = Scripted::new(spec(200, 2));
    let mut events = Events::new();
    for n in 0..40 {
        planner.submit(NewSequence { tenant: "flood".into(), ..job(&format!("f{n}"), 0..8, 10) }, NOW, &mut events);
    }
    let later: Vec<SeqId> = (0..10)
        .map(|n| {
            planner.submit(NewSequence { tenant: "late".into(), ..job(&format!("l{n}"), 0..8, 10) }, NOW, &mut events)
        })
        .collect();
    let ended = first_to_end(&mut planner, &mut executor, 20);
    let of_late = ended.iter().filter(|id| later.contains(id)).count();
    assert!((8..=10).contains(&of_late), "{of_late} of the first 20 belong to the tenant that came last");
}

#[test]
fn a_decoding_sequence_costs_few_bytes_on_the_wire() {
    let mut planner = Planner::new(Limits::default());
    let spec = millrace_protocol::engine::EngineSpec { step_tokens: 8_192, ..spec(20_000, 256) };
    planner.attach(&spec, NOW, &mut Events::new());
    for n in 0..256 {
        submit(&mut planner, job(&format!("job{n}"), n * 10..n * 10 + 7, 300));
    }
    // Blocks of 4 tokens: a new block every fourth step, far more often than blocks of 16 need one.
    while !planner.waiting.is_empty() {
        plan(&mut planner);
        planner.outstanding.clear();
    }
    let steps: Vec<Plan> = (0..4)
        .map(|_| {
            planner.outstanding.clear();
            plan(&mut planner)
        })
        .collect();
    for step in steps {
        assert_eq!(step.work.len(), 256);
        let bytes = postcard::to_stdvec(&step.work).unwrap().len();
        assert!(bytes < 256 * 40, "{bytes} bytes");
    }
}

#[test]
fn an_executor_may_pass_over_a_slot_that_failed_before() {
    let mut planner = planner(64, 4, limits(8));
    let ids: Vec<SeqId> = ["a", "b"].map(|name| submit(&mut planner, job(name, 0..3, 9))).to_vec();
    for _ in 0..2 {
        plan(&mut planner);
    }
    let token = |slot| millrace_protocol::step::SlotToken { slot: SlotId(slot), token: 7, logprobs: None };
    let error = millrace_protocol::JobError::new(ErrorCode::NotFinite, "x");
    let mut events = Events::new();
    planner.apply(vec![token(1)], vec![(SlotId(0), error.clone())], NOW, &mut events).unwrap();
    planner.apply(vec![token(1)], vec![], NOW, &mut events).unwrap();
    assert_eq!(events[0], (ids[0], Event::Failed(error)));
    assert_eq!(answer_of(ids[1], &events), [7, 7]);
}
