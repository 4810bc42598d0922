//! The work queue: identity, limits, deliveries and the ways a job leaves it.

use std::time::Duration;

use millrace_bus::{BusError, Kind};
use millrace_config::Streams;
use millrace_protocol::Class;
use millrace_runtime::Clock;

use crate::support::{job, model, publish, server, soon, streams};

const WAIT: Duration = Duration::from_secs(10);

async fn waiting(bus: &millrace_bus::Bus) -> u64 {
    bus.stream_status().await.unwrap()[0].messages
}

#[tokio::test]
async fn a_job_is_published_pulled_and_acknowledged() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let before_ms = Clock::system().unix_ms();
    let published = publish(&bus, "a").await;
    let jobs = bus.job_consumer(Class::Batch).pull(5, WAIT).await.unwrap();
    assert_eq!(jobs.len(), 1);
    assert_eq!(bus.subjects().parse_job(&jobs[0].subject).unwrap().job, job("a"));
    assert_eq!((jobs[0].delivery.job_seq, jobs[0].delivery.attempt), (published.seq, 1));
    assert_eq!(jobs[0].headers.get("Nats-Msg-Id").map(String::as_str), Some("a"));
    assert_eq!(&jobs[0].payload[..], br#"{"prompt":"Hi"}"#);
    assert!(jobs[0].published_unix_ms >= before_ms.saturating_sub(1_000));
    assert_eq!(waiting(&bus).await, 1);
    bus.ack_final(&jobs[0].delivery.ack_subject).await.unwrap();
    assert_eq!(waiting(&bus).await, 0);
}

#[tokio::test]
async fn classes_have_consumers_of_their_own() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    publish(&bus, "a").await;
    assert!(bus.job_consumer(Class::Interactive).pull(5, Duration::ZERO).await.unwrap().is_empty());
    assert_eq!(bus.job_consumer(Class::Batch).pull(5, WAIT).await.unwrap().len(), 1);
    let status = bus.consumer_status().await.unwrap();
    let pending: Vec<_> = status.iter().map(|c| (c.class, c.ack_pending)).collect();
    assert_eq!(pending, [(Class::Interactive, 0), (Class::Batch, 1), (Class::Stream, 0)]);
}

#[tokio::test]
async fn a_second_publication_is_a_duplicate_also_after_the_job_ended() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let first = publish(&bus, "a").await;
    let again = publish(&bus, "a").await;
    assert_eq!((first.duplicate, again.duplicate, again.seq), (false, true, first.seq));
    let jobs = bus.job_consumer(Class::Batch).pull(5, WAIT).await.unwrap();
    assert_eq!(jobs.len(), 1);
    bus.ack_final(&jobs[0].delivery.ack_subject).await.unwrap();
    assert!(publish(&bus, "a").await.duplicate);
    assert_eq!(waiting(&bus).await, 0);
}

#[tokio::test]
async fn an_oversized_job_is_refused_with_the_limit_by_name() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let limit = usize::try_from(streams().job_max_bytes).unwrap();
    let fits = bus.publish_job(Class::Batch, &model(), &job("fits"), vec![b'x'; limit].into()).await;
    assert!(fits.is_ok(), "{fits:?}");
    let error = bus.publish_job(Class::Batch, &model(), &job("big"), vec![b'x'; limit + 1].into()).await.unwrap_err();
    assert_eq!((error.kind(), error.label()), (Kind::Reject, "too_large"));
    assert!(error.to_string().contains("job_max_bytes = 262144"), "{error}");
    assert_eq!(waiting(&bus).await, 1);
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let server = server().await;
    let bus = server.bus(&Streams { jobs_max_messages: 2, ..streams() }).await;
    publish(&bus, "a").await;
    publish(&bus, "b").await;
    let error = bus.publish_job(Class::Batch, &model(), &job("c"), "{}".into()).await.unwrap_err();
    assert!(matches!(&error, BusError::Overloaded { retry_after, .. } if !retry_after.is_zero()), "{error}");
    assert_eq!(error.kind(), Kind::Retry);
}

#[tokio::test]
async fn a_silent_owner_loses_the_job_after_the_ack_wait() {
    let server = server().await;
    let bus = server.bus(&Streams { ack_wait: Duration::from_millis(500), ..streams() }).await;
    publish(&bus, "a").await;
    let consumer = bus.job_consumer(Class::Batch);
    let first = consumer.pull(1, WAIT).await.unwrap().remove(0);
    let second = consumer.pull(1, WAIT).await.unwrap().remove(0);
    assert_eq!((first.delivery.attempt, second.delivery.attempt), (1, 2));
    assert_eq!(first.delivery.job_seq, second.delivery.job_seq);
}

#[tokio::test]
async fn progress_keeps_the_job() {
    let server = server().await;
    let bus = server.bus(&Streams { ack_wait: Duration::from_millis(600), ..streams() }).await;
    publish(&bus, "a").await;
    let consumer = bus.job_consumer(Class::Batch);
    let held = consumer.pull(1, WAIT).await.unwrap().remove(0);
    let others = consumer.pull(1, Duration::from_millis(2_000));
    tokio::pin!(others);
    let mut heartbeat = tokio::time::interval(Duration::from_millis(150));
    let stolen = loop {
        tokio::select! {
            jobs = &mut others => break jobs.unwrap(),
            _ = heartbeat.tick() => bus.ack_progress(&held.delivery.ack_subject).await.unwrap(),
        }
    };
    assert!(stolen.is_empty(), "{stolen:?}");
    assert_eq!(consumer.pull(1, WAIT).await.unwrap()[0].delivery.attempt, 2);
}

#[tokio::test]
async fn nak_returns_and_term_removes() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    publish(&bus, "a").await;
    let consumer = bus.job_consumer(Class::Batch);
    let first = consumer.pull(1, WAIT).await.unwrap().remove(0);
    bus.nak(&first.delivery.ack_subject, Duration::ZERO).await.unwrap();
    let second = consumer.pull(1, WAIT).await.unwrap().remove(0);
    assert_eq!(second.delivery.attempt, 2);
    bus.nak(&second.delivery.ack_subject, Duration::from_millis(400)).await.unwrap();
    assert!(consumer.pull(1, Duration::from_millis(100)).await.unwrap().is_empty());
    let third = consumer.pull(1, WAIT).await.unwrap().remove(0);
    assert_eq!(third.delivery.attempt, 3);
    bus.term(&third.delivery.ack_subject, "poison").await.unwrap();
    assert_eq!(waiting(&bus).await, 0);
}

#[tokio::test]
async fn a_pull_never_takes_more_than_it_asked_for() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let consumer = bus.job_consumer(Class::Batch);
    assert!(consumer.pull(0, WAIT).await.unwrap().is_empty());
    assert!(consumer.pull(3, Duration::from_millis(50)).await.unwrap().is_empty());
    for name in ["a", "b", "c", "d", "e"] {
        publish(&bus, name).await;
    }
    assert_eq!(consumer.pull(3, WAIT).await.unwrap().len(), 3);
    assert_eq!(consumer.pull(3, WAIT).await.unwrap().len(), 2);
    assert_eq!((bus.requests_waiting(), bus.events().orphans()), (0, 0));
}

#[tokio::test]
async fn a_consumer_at_its_limit_waits_instead_of_spinning() {
    let server = server().await;
    let bus = server.bus(&Streams { max_ack_pending: 1, ..streams() }).await;
    publish(&bus, "a").await;
    publish(&bus, "b").await;
    let consumer = bus.job_consumer(Class::Batch);
    let (clock, wait) = (Clock::system(), Duration::from_millis(400));
    let started = clock.now();
    assert_eq!(consumer.pull(2, WAIT).await.unwrap().len(), 1);
    assert!(clock.now() - started < WAIT / 2, "the job lay about for {:?}", clock.now() - started);
    let started = clock.now();
    assert!(consumer.pull(1, wait).await.unwrap().is_empty());
    assert!(clock.now() - started >= wait / 2, "returned after {:?}", clock.now() - started);
}

#[tokio::test]
async fn a_job_that_meets_a_dropped_pull_goes_back_at_once() {
    let server = server().await;
    // An hour: a job lost to the dropped pull would not come back within the test's limit.
    let bus = server.bus(&Streams { ack_wait: Duration::from_secs(3_600), ..streams() }).await;
    let consumer = bus.job_consumer(Class::Batch);
    let dropped = tokio::time::timeout(Duration::from_millis(200), consumer.pull(1, WAIT)).await;
    assert!(dropped.is_err());
    publish(&bus, "a").await;
    let jobs = soon(consumer.pull(1, WAIT)).await.unwrap();
    // Either pull may get it first. The server counts an attempt also if the dropped pull was gone when it sent.
    let (attempt, orphans) = (u64::from(jobs[0].delivery.attempt), bus.events().orphans());
    assert!((1 + orphans..=2).contains(&attempt), "attempt {attempt}, {orphans} orphans");
}

#[tokio::test]
async fn dead_letters_keep_the_document() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    bus.dead_letter("poison", "a", "five\nattempts", "{}".into()).await.unwrap();
    let status = bus.stream_status().await.unwrap();
    assert_eq!((status[2].name.as_str(), status[2].messages), ("MILLRACE_V1_DLQ", 1));
}
