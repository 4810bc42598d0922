//! What a subscriber gets when something dies: the same text, no gap, no repeat.

use millrace_protocol::ready::OfferReply;
use millrace_protocol::{ErrorCode, Status};
use millrace_scheduler::StopNow;

use crate::executor::Executor;
use crate::support::{World, job_id, soon, tokens};

const TEXT: &str = "A red ball moves to the left, and 😀 a blue one stays where it is, says the caption.";

#[actix::test]
async fn another_executor_takes_over() {
    let world = World::new().await;
    let first = Executor::start(&world.bus, "x1", &[("a", TEXT)]).await;
    let scheduler = world.scheduler().await;
    world.begun(&scheduler, &first, "a").await;
    let second = Executor::start(&world.bus, "x2", &[("a", TEXT)]).await;
    second.open();
    first.kill();
    let output = world.output("a").await;
    assert_eq!((output.text.as_str(), output.last.text.as_str()), (TEXT, TEXT));
    assert_eq!((output.claims, output.last.status), (1, Status::Done));
    assert_eq!(scheduler.snapshot().await.executor.as_deref(), Some("x2"));
    assert_eq!(scheduler.metric("millrace_scheduler_sessions_lost_total"), 1.0);
}

#[actix::test]
async fn another_scheduler_continues_behind_what_is_shown() {
    let world = World::new().await;
    let x1 = Executor::start(&world.bus, "x1", &[("a", TEXT)]).await;
    let first = world.scheduler().await;
    world.begun(&first, &x1, "a").await;
    first.addr.send(StopNow).await.unwrap();
    x1.kill();
    let x2 = Executor::start(&world.bus, "x2", &[("a", TEXT)]).await;
    x2.open();
    let second = world.scheduler().await;
    second.attached().await;
    let again = world.redelivered("a").await;
    assert_eq!(again.delivery.attempt, 2);
    assert!(!again.shown.token_ids.is_empty());
    world.offer(&second, &again).await;
    let output = world.output("a").await;
    assert_eq!((output.text.as_str(), output.last.text.as_str()), (TEXT, TEXT));
    assert_eq!((output.claims, output.last.usage.completion_tokens), (2, tokens(TEXT).len() as u64 + 1));
}

#[actix::test]
async fn a_stale_owner_is_shut_out() {
    let world = World::new().await;
    let answers = [("a", TEXT)];
    let x1 = Executor::start(&world.bus, "x1", &answers).await;
    let first = world.scheduler().await;
    let offer = world.begun(&first, &x1, "a").await;
    // The first owner lives on, but somebody else was given the job.
    let x2 = Executor::start(&world.bus, "x2", &answers).await;
    let second = world.scheduler().await;
    second.until(|snapshot| snapshot.executor.as_deref() == Some("x2")).await;
    let mut again = offer.clone();
    (again.delivery.attempt, again.shown) = (2, world.shown("a").await);
    assert_eq!(world.offer(&second, &again).await, OfferReply::Accepted);
    x2.steps(3);
    world.shows("a", 6).await;
    x1.open();
    first.until(|snapshot| snapshot.jobs == 0 && snapshot.counts.running == 0).await;
    assert_eq!(first.metric("millrace_scheduler_stale_writes_total"), 1.0);
    x2.open();
    let output = world.output("a").await;
    assert_eq!((output.text.as_str(), output.claims), (TEXT, 2));
}

#[actix::test]
async fn a_draining_scheduler_gives_back_what_it_cannot_finish() {
    let world = World::new().await;
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT)]).await;
    let first = world.scheduler().await;
    world.begun(&first, &executor, "a").await;
    first.drain.start_draining();
    let again = world.redelivered("a").await;
    assert_eq!(again.delivery.attempt, 2);
    assert!(first.drain.wait_idle(world.settings.drain_timeout).await);
    soon(async {
        while first.addr.connected() {
            tokio::task::yield_now().await
        }
    })
    .await;
    // The executor was given back, so that the next scheduler has it at once.
    let second = world.scheduler().await;
    second.attached().await;
    executor.open();
    world.offer(&second, &again).await;
    assert_eq!(world.output("a").await.text, TEXT);
}

#[actix::test]
async fn a_restarted_nats_server_costs_no_text() {
    let world = World::new().await;
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT)]).await;
    let scheduler = world.scheduler().await;
    world.begun(&scheduler, &executor, "a").await;
    let follow = world.bus.follow(&job_id("a"), 0).await.unwrap();
    let pid = world.server.pid().unwrap();
    let killed = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert!(killed.success());
    executor.open();
    let output = world.followed("a", follow).await;
    assert_eq!((output.text.as_str(), output.last.text.as_str()), (TEXT, TEXT));
}

#[actix::test]
async fn a_job_whose_pages_are_lost_is_prepared_again() {
    let world = World::new().await;
    let failing = Some(("a", ErrorCode::PageLost));
    let executor = Executor::failing(&world.bus, "x", &[("a", TEXT)], failing).await;
    executor.open();
    let scheduler = world.scheduler().await;
    world.offered(&scheduler, "a").await;
    let again = world.redelivered("a").await;
    assert_eq!(again.delivery.attempt, 2);
    world.offer(&scheduler, &again).await;
    let output = world.output("a").await;
    assert_eq!((output.text.as_str(), output.claims), (TEXT, 2));
}

#[actix::test]
async fn a_sequence_that_fails_alone_ends_alone() {
    let world = World::new().await;
    let failing = Some(("bad", ErrorCode::NotFinite));
    let executor = Executor::failing(&world.bus, "x", &[("bad", TEXT), ("good", TEXT)], failing).await;
    let scheduler = world.scheduler().await;
    scheduler.attached().await;
    for name in ["bad", "good"] {
        let offer = world.delivered(name).await;
        world.offer(&scheduler, &offer).await;
    }
    executor.open();
    let bad = world.output("bad").await.last;
    assert_eq!((bad.status, bad.error.map(|error| error.code)), (Status::Failed, Some(ErrorCode::NotFinite)));
    assert_eq!(world.output("good").await.text, TEXT);
}
