//! What a subscriber gets when nothing goes wrong but the job itself.

use std::time::Duration;

use millrace_protocol::pages::PageLease;
use millrace_protocol::ready::{Offer, OfferReply};
use millrace_protocol::{ErrorCode, FinishReason, Status};

use crate::executor::Executor;
use crate::support::{World, job_id, ready, tokens};

const TEXT: &str = "A red ball moves to the left, and 😀 a blue one stays.";

#[actix::test]
async fn a_job_is_answered_exactly_once() {
    let world = World::new().await;
    let mut leases = world.leases().await;
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT)]).await;
    executor.open();
    let scheduler = world.scheduler().await;
    scheduler.attached().await;
    assert!(world.health.is_ready());
    let offer = world.delivered("a").await;
    assert_eq!(world.offer(&scheduler, &offer).await, OfferReply::Accepted);
    let output = world.output("a").await;
    assert_eq!((output.text.as_str(), output.last.text.as_str()), (TEXT, TEXT));
    assert_eq!((&output.token_ids, &output.last.token_ids), (&tokens(TEXT), &tokens(TEXT)));
    assert_eq!((output.last.status, output.last.finish_reason), (Status::Done, Some(FinishReason::Stop)));
    assert_eq!(output.claims, 1);
    let usage = output.last.usage;
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (20, tokens(TEXT).len() as u64 + 1));
    assert_eq!(output.last.metadata, Some(serde_json::json!({"a": 1})));
    assert!(output.last.timings.total_ms >= output.last.timings.first_token_ms);
    scheduler.until(|snapshot| snapshot.jobs == 0).await;
    let released = loop {
        match postcard::from_bytes(&leases.next().await.unwrap().payload).unwrap() {
            PageLease::Release(job) => break job,
            PageLease::Renew(jobs) => assert_eq!(jobs, [job_id("a")]),
        }
    };
    assert_eq!(released, job_id("a"));
    assert!(world.queue_is_empty().await);
    assert_eq!(scheduler.metric("millrace_scheduler_generated_tokens_total"), tokens(TEXT).len() as f64);
}

#[actix::test]
async fn many_jobs_share_steps_and_keep_their_own_text() {
    let world = World::new().await;
    let names: Vec<String> = (0..24).map(|n| format!("job{n}")).collect();
    let texts: Vec<String> = (0..24).map(|n| format!("{TEXT} number {n}")).collect();
    let answers: Vec<(&str, &str)> = names.iter().zip(&texts).map(|(n, t)| (n.as_str(), t.as_str())).collect();
    let executor = Executor::start(&world.bus, "x", &answers).await;
    executor.open();
    let scheduler = world.scheduler().await;
    scheduler.attached().await;
    for name in &names {
        let offer = world.delivered(name).await;
        assert_eq!(world.offer(&scheduler, &offer).await, OfferReply::Accepted);
    }
    for (name, text) in answers {
        assert_eq!(world.output(name).await.last.text, text);
    }
    scheduler.until(|snapshot| snapshot.jobs == 0 && snapshot.counts.running == 0).await;
}

#[actix::test]
async fn a_stop_text_across_tokens_ends_the_answer_and_is_not_shown() {
    let world = World::new().await;
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT)]).await;
    executor.open();
    let scheduler = world.scheduler().await;
    scheduler.attached().await;
    let mut offer = world.delivered("a").await;
    offer.ready.stop = vec![" left, and".into(), "never".into()];
    world.offer(&scheduler, &offer).await;
    let output = world.output("a").await;
    assert_eq!(
        (output.text.as_str(), output.last.text.as_str()),
        ("A red ball moves to the", "A red ball moves to the")
    );
    assert_eq!(output.last.stop.as_deref(), Some(" left, and"));
    scheduler.until(|snapshot| snapshot.counts.running == 0).await;
}

#[actix::test]
async fn without_streaming_only_the_final_is_stored() {
    let world = World::new().await;
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT)]).await;
    executor.open();
    let scheduler = world.scheduler().await;
    scheduler.attached().await;
    let mut offer = world.delivered("a").await;
    (offer.ready.stream, offer.ready.max_tokens) = (false, 5);
    world.offer(&scheduler, &offer).await;
    let output = world.output("a").await;
    assert_eq!((output.deltas, output.last.token_ids.as_slice()), (0, &tokens(TEXT)[..5]));
    assert_eq!(output.last.finish_reason, Some(FinishReason::Length));
}

#[actix::test]
async fn jobs_that_cannot_run_end_with_a_code() {
    let world = World::new().await;
    let executor = Executor::start(&world.bus, "x", &[("late", TEXT)]).await;
    let scheduler = world.scheduler().await;
    scheduler.attached().await;
    let mut large = world.delivered("large").await;
    large.ready.prompt = vec![5; 400];
    assert_eq!(world.offer(&scheduler, &large).await, OfferReply::Accepted);
    let mut late = world.delivered("late").await;
    late.ready.deadline_unix_ms = Some(1);
    world.offer(&scheduler, &late).await;
    for (name, status, code) in
        [("large", Status::Rejected, ErrorCode::ContextLength), ("late", Status::Expired, ErrorCode::DeadlineExceeded)]
    {
        let last = world.output(name).await.last;
        assert_eq!((last.status, last.error.map(|error| error.code)), (status, Some(code)));
    }
    scheduler.until(|snapshot| snapshot.jobs == 0).await;
    drop(executor);
}

#[actix::test]
async fn a_cancelled_job_stops_where_it_is() {
    let world = World::new().await;
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT), ("b", TEXT)]).await;
    let scheduler = world.scheduler().await;
    world.offered(&scheduler, "a").await;
    executor.steps(4);
    world.shows("a", 2).await;
    world.bus.cancel(&job_id("a")).await.unwrap();
    let output = world.output("a").await;
    assert_eq!(output.last.status, Status::Cancelled);
    assert!(TEXT.starts_with(&output.text) && output.text == output.last.text && output.text != TEXT);
    let snapshot = scheduler.until(|snapshot| snapshot.jobs == 0).await;
    assert_eq!(snapshot.counts.running, 0);
    // A tombstone that was written before the offer counts as well.
    world.bus.cancel(&job_id("b")).await.unwrap();
    let offer = world.delivered("b").await;
    world.offer(&scheduler, &offer).await;
    assert_eq!(world.output("b").await.last.status, Status::Cancelled);
}

#[actix::test]
async fn an_offer_is_taken_once() {
    let world = World::with(|config| config.scheduler.waiting = 0).await;
    let scheduler = world.scheduler().await;
    let offer = world.delivered("a").await;
    assert_eq!(world.offer(&scheduler, &offer).await, OfferReply::Busy, "no executor yet");
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT)]).await;
    scheduler.attached().await;
    assert_eq!(world.offer(&scheduler, &offer).await, OfferReply::Accepted);
    assert_eq!(world.offer(&scheduler, &offer).await, OfferReply::Accepted, "its answer may have been lost");
    let mut second = offer.clone();
    second.delivery.job_seq += 1;
    assert_eq!(world.offer(&scheduler, &second).await, OfferReply::Settled, "a second submission");
    let other = Offer {
        ready: millrace_protocol::ready::ReadyJob { model: "other".to_owned().try_into().unwrap(), ..ready("o") },
        ..offer.clone()
    };
    assert_eq!(world.offer(&scheduler, &other).await, OfferReply::Busy, "another model");
    for n in 0..7 {
        let filler = Offer { ready: ready(&format!("filler{n}")), ..offer.clone() };
        assert_eq!(world.offer(&scheduler, &filler).await, OfferReply::Accepted);
    }
    let full = Offer { ready: ready("full"), ..offer.clone() };
    assert_eq!(world.offer(&scheduler, &full).await, OfferReply::Busy, "eight slots");
    assert_eq!(scheduler.snapshot().await.jobs, 8);
    drop(executor);
}

#[actix::test]
async fn the_job_stays_ours_longer_than_the_ack_wait() {
    let world = World::with(|config| config.streams.ack_wait = Duration::from_secs(1)).await;
    let executor = Executor::start(&world.bus, "x", &[("a", TEXT)]).await;
    let scheduler = world.scheduler().await;
    world.offered(&scheduler, "a").await;
    let consumer = world.bus.job_consumer(millrace_protocol::Class::Interactive);
    assert!(consumer.pull(1, Duration::from_secs(3)).await.unwrap().is_empty(), "delivered again");
    executor.open();
    assert_eq!(world.output("a").await.last.text, TEXT);
}
