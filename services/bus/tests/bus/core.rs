//! Core messages: requests, errors, bounds, and nothing left behind.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_bus::{BusError, Kind};

use crate::support::{job, server, soon, streams};

#[tokio::test]
async fn requests_are_answered_or_fail_by_name() {
    let server = server().await;
    let (asker, answerer) = (server.connect(&streams()).await, server.connect(&streams()).await);
    let mut requests = answerer.subscribe("test.echo", 16, None).await.unwrap();
    let serving = tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            match &request.payload[..] {
                b"fail" => answerer.reply_error(&request, 413, "too\nmuch").await.unwrap(),
                _ => answerer.reply(&request, request.payload.clone()).await.unwrap(),
            }
        }
    });
    let second = Duration::from_secs(5);
    for n in 0..100 {
        let text = format!("message {n}");
        assert_eq!(asker.request("test.echo", text.clone().into(), second).await.unwrap(), text);
    }
    let error = asker.request("test.echo", "fail".into(), second).await.unwrap_err();
    assert!(matches!(&error, BusError::Service { code: 413, message } if message == "too much"), "{error}");
    let error = asker.request("test.nobody", "".into(), second).await.unwrap_err();
    assert_eq!((error.label(), error.kind()), ("no_responders", Kind::Retry));
    serving.abort();
}

#[tokio::test]
async fn unanswered_requests_leave_nothing_behind() {
    let server = server().await;
    let bus = server.connect(&streams()).await;
    let _silent = bus.subscribe("test.silent", 1_000, None).await.unwrap();
    let asked = (0..300).map(|_| bus.request("test.silent", "".into(), Duration::from_millis(50)));
    for answer in futures::future::join_all(asked).await {
        assert_eq!(answer.unwrap_err().label(), "timeout");
    }
    assert_eq!((bus.requests_waiting(), bus.events().timeouts()), (0, 300));
}

#[tokio::test]
async fn a_subscription_is_bounded_and_counts_what_it_drops() {
    let server = server().await;
    let bus = server.connect(&streams()).await;
    let mut slow = bus.subscribe("test.flood", 4, None).await.unwrap();
    for n in 0..100_u32 {
        bus.publish("test.flood", n.to_string().into()).await.unwrap();
    }
    soon(async {
        while bus.events().dropped() < 96 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let kept: Vec<_> = std::iter::from_fn(|| slow.try_next()).map(|m| m.payload).collect();
    assert_eq!(kept, ["0", "1", "2", "3"]);
}

#[tokio::test]
async fn a_queue_group_shares_messages() {
    let server = server().await;
    let (one, two) = (server.connect(&streams()).await, server.connect(&streams()).await);
    let mut first = one.subscribe("test.work", 1_000, Some("workers")).await.unwrap();
    let mut second = two.subscribe("test.work", 1_000, Some("workers")).await.unwrap();
    let (mut seen_first, mut seen_second) = (0_u32, 0_u32);
    for _ in 0..100 {
        one.publish("test.work", "x".into()).await.unwrap();
    }
    while seen_first + seen_second < 100 {
        soon(async {
            tokio::select! {
                _ = first.next() => seen_first += 1,
                _ = second.next() => seen_second += 1,
            }
        })
        .await;
    }
    assert!(seen_first > 0 && seen_second > 0, "{seen_first} and {seen_second}");
    assert!(first.try_next().is_none() && second.try_next().is_none());
}

#[tokio::test]
async fn an_oversized_message_is_refused_and_the_connection_stays() {
    let server = server().await;
    let bus = server.connect(&streams()).await;
    let big = vec![0_u8; bus.max_payload_bytes() + 1];
    let error = bus.publish("test.big", big.into()).await.unwrap_err();
    assert_eq!(error.label(), "too_large");
    assert_eq!(bus.events().disconnects(), 0);
}

#[tokio::test]
async fn a_cancellation_is_remembered_and_broadcast() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let mut broadcast = bus.subscribe(&bus.subjects().cancel_all(), 16, None).await.unwrap();
    assert!(!bus.is_cancelled(&job("a")).await.unwrap());
    bus.cancel(&job("a")).await.unwrap();
    bus.cancel(&job("a")).await.unwrap();
    assert!(bus.is_cancelled(&job("a")).await.unwrap());
    assert!(!bus.is_cancelled(&job("b")).await.unwrap());
    let heard = soon(broadcast.next()).await.unwrap();
    assert_eq!(bus.subjects().parse_cancel(&heard.subject), Some(job("a")));
}

#[tokio::test]
async fn services_are_discovered_until_they_stop() {
    let server = server().await;
    let (one, two) = (server.connect(&streams()).await, server.connect(&streams()).await);
    let timeout = Duration::from_millis(300);
    assert!(one.discover(timeout).await.unwrap().is_empty());
    let metadata = |actor: &str| BTreeMap::from([("actor".to_string(), actor.to_string())]);
    let first = one.register_service("millrace-preprocess", "0.1.0", "test", metadata("p1")).await.unwrap();
    let second = two.register_service("millrace-execute", "0.1.0", "test", metadata("e1")).await.unwrap();
    let found = one.discover(timeout).await.unwrap();
    let names: Vec<_> = found.iter().map(|s| (s.name.as_str(), s.metadata["actor"].as_str())).collect();
    assert_eq!(names, [("millrace-execute", "e1"), ("millrace-preprocess", "p1")]);
    assert_eq!(found[0].id, second.id().await);
    first.stop().await;
    second.stop().await;
    assert!(two.register_service("no spaces", "0.1.0", "", BTreeMap::new()).await.is_err());
}
