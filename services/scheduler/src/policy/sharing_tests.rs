//! Exact cases of what sequences have in common: beginnings under way, weights of tenants, blocks that are shared.

use std::time::Duration;

use millrace_protocol::{ErrorCode, JobError, SlotId};

use super::planner_tests::{NOW, answer, answer_of, drawn_answer, first_to_end, limits, plan, planner, run, submit};
use super::prefix::HashChain;
use super::scripted::{Scripted, job, spec};
use super::sequence::{NewSequence, SeqId};
use super::{Event, Events, Limits};

fn opened(plan: &super::Plan) -> Vec<(&str, u32)> {
    plan.open.iter().map(|open| (open.job.as_str(), open.cached_tokens)).collect()
}

#[test]
fn equal_prompts_that_come_together_are_computed_once() {
    let mut planner = planner(64, 4, limits(64));
    let mut executor = Scripted::new(spec(64, 4));
    let ids = ["a", "b", "c"].map(|name| submit(&mut planner, job(name, 0..20, 6)));
    let (first, second) = (plan(&mut planner), plan(&mut planner));
    assert_eq!(
        (opened(&first), opened(&second)),
        (vec![("a", 0)], vec![]),
        "the others wait for the first one's blocks"
    );
    executor.send(first);
    executor.send(second);
    let mut events = answer(&mut planner, &mut executor);
    let third = plan(&mut planner);
    assert_eq!(opened(&third), [("b", 16), ("c", 16)]);
    executor.send(third);
    events.extend(run(&mut planner, &mut executor));
    for (id, name) in ids.into_iter().zip(["a", "b", "c"]) {
        assert_eq!(answer_of(id, &events), drawn_answer(name, 6));
    }
}

#[test]
fn who_saves_less_than_half_does_not_wait() {
    // (tokens in common with one of 20, tokens of its own, whether it waits)
    for (common, own, waits) in [(16, 16, true), (16, 17, false), (19, 13, true), (3, 1, false), (0, 20, false)] {
        let mut planner = planner(64, 4, limits(64));
        submit(&mut planner, job("a", 0..20, 6));
        submit(&mut planner, job("b", (0..common).chain(100..100 + own), 6));
        let first = plan(&mut planner);
        assert_eq!(opened(&first).len(), if waits { 1 } else { 2 }, "{common} in common, {own} of its own");
    }
}

#[test]
fn nobody_waits_for_a_lower_level_another_tenant_or_what_is_not_planned() {
    let urgent = NewSequence { priority: 9, ..job("b", 0..20, 6) };
    let foreign = NewSequence { tenant: "other".into(), ..job("b", 0..20, 6) };
    for new in [urgent, foreign] {
        let mut planner = planner(64, 4, limits(64));
        submit(&mut planner, job("a", 0..20, 6));
        plan(&mut planner);
        submit(&mut planner, new);
        assert_eq!(opened(&plan(&mut planner)), [("b", 0)]);
    }
    // Without a prefix cache nothing is found, so nothing is waited for.
    let mut planner = planner(64, 4, Limits { prefix_cache: false, ..limits(64) });
    for name in ["a", "b"] {
        submit(&mut planner, job(name, 0..20, 6));
    }
    assert_eq!(opened(&plan(&mut planner)).len(), 2);
}

#[test]
fn when_the_first_one_ends_early_the_next_one_computes() {
    let ends: [fn(&mut super::Planner, SeqId); 2] = [
        |planner, id| drop(planner.remove(id)),
        |planner, _| {
            let error = JobError::new(ErrorCode::NotFinite, "x");
            planner.apply(vec![], vec![(SlotId(0), error)], NOW, &mut Events::new()).unwrap();
        },
    ];
    for end in ends {
        let mut planner = planner(64, 4, limits(64));
        let [a, _] = ["a", "b"].map(|name| submit(&mut planner, job(name, 0..20, 6)));
        plan(&mut planner);
        end(&mut planner, a);
        assert_eq!(opened(&plan(&mut planner)), [("b", 0)]);
    }
}

#[test]
fn tenants_share_by_weight() {
    let weights = [("gold".to_owned(), 3)].into();
    let mut planner = planner(200, 2, Limits { tenant_weights: weights, ..limits(16) });
    let mut executor = Scripted::new(spec(200, 2));
    let mut events = Events::new();
    let mut of_gold = Vec::new();
    for n in 0..40 {
        for tenant in ["plain", "gold"] {
            let first = n * 100;
            let new = NewSequence { tenant: tenant.into(), ..job(&format!("{tenant}{n}"), first..first + 8, 10) };
            let id = planner.submit(new, NOW, &mut events);
            of_gold.extend((tenant == "gold").then_some(id));
        }
    }
    let ended = first_to_end(&mut planner, &mut executor, 40);
    let gold = ended.iter().filter(|id| of_gold.contains(id)).count();
    assert!((28..=32).contains(&gold), "{gold} of the first 40 belong to the tenant of weight 3");
}

#[test]
fn a_shared_block_that_would_be_written_is_found() {
    let mut planner = planner(64, 4, limits(64));
    let id = submit(&mut planner, job("a", 0..6, 6));
    plan(&mut planner);
    // Nothing in the policy shares a block that is not full; a bug that did is caught by the books.
    let mut foreign = HashChain::new("w", "x");
    foreign.extend(&[1, 2, 3, 4], &[], 4);
    let hash = foreign.hashes()[0];
    let table = &planner.arena.get(id).unwrap().running().unwrap().table;
    let pool = &mut planner.engine.as_mut().unwrap().pool;
    pool.register(&table[1], hash);
    let second = pool.lookup(&hash).unwrap();
    let wrong = planner.check().unwrap_err().to_string();
    assert!(wrong.contains("shared before it is full"), "{wrong}");
    planner.engine.as_mut().unwrap().pool.release(second);
}

#[test]
fn a_cancelled_job_frees_its_blocks_at_every_stage() {
    for answers in 0..7 {
        let mut planner = planner(64, 2, limits(8));
        let mut executor = Scripted::new(spec(64, 2));
        let [id, other] = ["a", "b"].map(|name| {
            let first = u32::from(name == "b") * 100;
            submit(&mut planner, job(name, first..first + 20, 9))
        });
        let mut events = Events::new();
        for _ in 0..answers {
            while let Some(plan) = planner.plan(NOW, &mut events) {
                executor.send(plan);
            }
            answer(&mut planner, &mut executor);
        }
        assert!(planner.remove(id).is_some());
        planner.check().unwrap();
        let held = planner.sequence(other).and_then(|s| s.running()).map_or(0, |running| running.table.len());
        assert_eq!(planner.counts().free_blocks, 64 - held, "after {answers} answers");
        run(&mut planner, &mut executor);
        assert_eq!(planner.counts().free_blocks, 64);
    }
}

#[test]
fn a_running_job_that_cannot_make_it_any_more_ends_early() {
    let mut planner = planner(64, 2, limits(64));
    let mut executor = Scripted::new(spec(64, 2));
    submit(&mut planner, job("measure", 0..4, 3));
    run(&mut planner, &mut executor);
    // Steps take 10 ms; half of that counts. 100 tokens without any stop: 500 ms at least.
    let deadline = Some(NOW + Duration::from_millis(600));
    let id = submit(&mut planner, NewSequence { stop_token_ids: vec![], deadline, ..job("a", 50..54, 100) });
    let other = submit(&mut planner, NewSequence { deadline, ..job("b", 80..84, 100) });
    executor.send(plan(&mut planner));
    answer(&mut planner, &mut executor);
    let mut events = Events::new();
    // 99 tokens are left; the first of them is computed already.
    let mut at = |ms| {
        executor.send(planner.plan(NOW + Duration::from_millis(ms), &mut events).unwrap());
        planner.check().unwrap();
        let (tokens, busy) = executor.step().unwrap();
        planner.apply(tokens, vec![], busy, &mut Events::new()).unwrap();
        std::mem::take(&mut events)
    };
    assert_eq!(at(100), []);
    assert_eq!(at(120), [(id, Event::Expired)]);
    assert!(planner.sequence(other).is_some(), "it may stop at any token");
}

#[test]
fn newcomers_are_spread_over_plans_that_fit_a_message() {
    let plan_bytes = 1_800;
    let mut planner = planner(64, 8, Limits { plan_bytes, ..limits(64) });
    for n in 0..4 {
        submit(&mut planner, job(&format!("j{n}"), n * 100..n * 100 + 8, 4));
    }
    assert_eq!(opened(&plan(&mut planner)).len(), 1, "two of them may weigh more than is left");
    let mut events = Events::new();
    planner.submit(job("long", 0..200, 50), NOW, &mut events);
    assert!(matches!(&events[..], [(_, Event::Refused(error))] if error.code == ErrorCode::TooLarge), "{events:?}");
}
