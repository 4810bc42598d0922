//! Pairs of schedulers and executors that come, go and misbehave: messages that are lost, executors that are deaf, jobs
//! that move to another pair.

use std::time::Duration;

use millrace_protocol::engine::SchedulerBeacon;
use millrace_protocol::prefix::HashChain;
use millrace_protocol::ready::OfferReply;

use crate::executor::{Executor, Fault};
use crate::support::{World, ready, soon};

const TEXT: &str = "A red ball moves to the left, and a blue one stays where it is.";

/// A world in which nothing but the peers' own signs tells of a loss: steps may take for ever.
async fn patient(run_ahead: u32) -> World {
    World::with(|config| {
        config.scheduler.step_timeout = Duration::from_secs(3_600);
        config.scheduler.run_ahead = run_ahead;
    })
    .await
}

/// Runs one job on an executor with a fault; how many sessions were lost.
async fn with_fault(fault: Fault) -> f64 {
    let world = patient(1).await;
    let executor = Executor::faulty(&world.bus, "x", &[("a", TEXT)], fault).await;
    executor.open();
    let scheduler = world.scheduler().await;
    world.offered(&scheduler, "a").await;
    let output = world.output("a").await;
    assert_eq!((output.text.as_str(), output.claims), (TEXT, 1));
    scheduler.metric("millrace_scheduler_sessions_lost_total")
}

#[actix::test]
async fn a_lost_plan_is_noticed_though_no_other_follows() {
    assert_eq!(with_fault(Fault::LosesPlan(3)).await, 1.0);
}

#[actix::test]
async fn a_lost_output_is_noticed_though_no_other_follows() {
    assert_eq!(with_fault(Fault::LosesOutput(3)).await, 1.0);
}

#[actix::test]
async fn an_executor_that_beats_but_is_deaf_loses_its_sequences_to_another() {
    let world = patient(2).await;
    let deaf = Executor::faulty(&world.bus, "x1", &[("a", TEXT)], Fault::DeafAfter(6)).await;
    let scheduler = world.scheduler().await;
    world.begun(&scheduler, &deaf, "a").await;
    let second = Executor::start(&world.bus, "x2", &[("a", TEXT)]).await;
    second.open();
    let output = world.output("a").await;
    assert_eq!((output.text.as_str(), output.claims), (TEXT, 1));
    assert_eq!(scheduler.snapshot().await.executor.as_deref(), Some("x2"));
}

#[actix::test]
async fn jobs_of_a_pair_without_executor_go_on_at_another_pair() {
    let world = World::new().await;
    let answers = [("a", TEXT), ("b", TEXT)];
    let x1 = Executor::start(&world.bus, "x1", &answers).await;
    let first = world.scheduler().await;
    first.until(|snapshot| snapshot.executor.as_deref() == Some("x1")).await;
    let x2 = Executor::start(&world.bus, "x2", &answers).await;
    x2.open();
    let second = world.scheduler().await;
    second.until(|snapshot| snapshot.executor.as_deref() == Some("x2")).await;
    let (a, b) = (world.delivered("a").await, world.delivered("b").await);
    world.offer(&first, &a).await;
    world.offer(&second, &b).await;
    x1.steps(6);
    world.shows("a", 4).await;
    x1.kill();
    assert_eq!(world.output("b").await.text, TEXT, "the other pair does not care");
    let again = world.redelivered("a").await;
    first.until(|snapshot| snapshot.jobs == 0).await;
    assert_eq!(world.offer(&first, &again).await, OfferReply::Busy, "a scheduler without executor takes nothing");
    assert_eq!(world.offer(&second, &again).await, OfferReply::Accepted);
    let output = world.output("a").await;
    assert_eq!((output.text.as_str(), output.claims), (TEXT, 2));
}

#[actix::test]
async fn the_beacon_tells_which_beginnings_are_cached() {
    let world = World::new().await;
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT)]).await;
    executor.open();
    let mut beacons = world.bus.subscribe(&world.bus.subjects().scheduler_beacons(), 100, None).await.unwrap();
    let scheduler = world.scheduler().await;
    world.offered(&scheduler, "a").await;
    world.output("a").await;
    let chain = |tenant: &str| {
        let mut chain = HashChain::new("w", tenant);
        chain.extend(&ready("a").prompt, &[], 16);
        chain
    };
    soon(async {
        loop {
            let message = beacons.next().await.unwrap();
            let beacon: SchedulerBeacon = serde_json::from_slice(&message.payload).unwrap();
            assert_eq!(beacon.prefixes.leading(chain("stranger").hashes()), 0);
            if beacon.prefixes.leading(chain("").hashes()) == 1 {
                return;
            }
        }
    })
    .await;
}
