//! Streams: created once by many, verified by name, changed where they may be.

use std::time::Duration;

use millrace_bus::{BusError, Kind};
use millrace_config::{Storage, StreamMode, Streams};

use crate::support::{publish, server, streams};

#[tokio::test]
async fn many_processes_may_create_at_once() {
    let server = server().await;
    let mut buses = Vec::new();
    for _ in 0..6 {
        buses.push(server.connect(&streams()).await);
    }
    for result in futures::future::join_all(buses.iter().map(|bus| bus.ensure_streams())).await {
        result.unwrap();
    }
    publish(&buses[0], "a").await;
    buses[1].ensure_streams().await.unwrap();
    assert_eq!(buses[2].stream_status().await.unwrap()[0].messages, 1);
}

#[tokio::test]
async fn verify_mode_names_what_is_missing_or_differs() {
    let server = server().await;
    let verify = Streams { mode: StreamMode::Verify, ..streams() };
    let error = server.connect(&verify).await.ensure_streams().await.unwrap_err();
    assert!(matches!(&error, BusError::Missing { object } if object.contains("MILLRACE_V1_JOBS")), "{error}");
    server.bus(&streams()).await;
    server.connect(&verify).await.ensure_streams().await.unwrap();
    let cases = [
        (Streams { jobs_max_bytes: 9 << 20, ..verify.clone() }, "max_bytes"),
        (Streams { out_max_age: Duration::from_secs(60), ..verify.clone() }, "max_age"),
        (Streams { storage: Storage::Memory, ..verify.clone() }, "storage"),
        (Streams { ack_wait: Duration::from_secs(3), ..verify.clone() }, "ack_wait"),
        (Streams { max_ack_pending: 7, ..verify.clone() }, "max_ack_pending"),
    ];
    for (wanted, named) in cases {
        let error = server.connect(&wanted).await.ensure_streams().await.unwrap_err();
        assert!(matches!(&error, BusError::Mismatch { field, .. } if *field == named), "{named}: {error}");
        assert_eq!(error.kind(), Kind::Fatal);
    }
}

#[tokio::test]
async fn create_mode_changes_limits_and_keeps_messages() {
    let server = server().await;
    publish(&server.bus(&streams()).await, "a").await;
    let wider = Streams { jobs_max_bytes: 9 << 20, max_ack_pending: 7, ack_wait: Duration::from_secs(3), ..streams() };
    let bus = server.bus(&wider).await;
    let jobs = &bus.stream_status().await.unwrap()[0];
    assert_eq!((jobs.max_bytes, jobs.messages), (Some(9 << 20), 1));
    let verify = Streams { mode: StreamMode::Verify, ..wider };
    server.connect(&verify).await.ensure_streams().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_changed_is_an_error() {
    let server = server().await;
    server.bus(&streams()).await;
    let memory = Streams { storage: Storage::Memory, ..streams() };
    let error = server.connect(&memory).await.ensure_streams().await.unwrap_err();
    assert!(error.to_string().contains("storage"), "{error}");
    assert_eq!(error.kind(), Kind::Fatal);
}

#[tokio::test]
async fn limits_beyond_the_server_s_storage_are_explained() {
    let server = server().await;
    let bus = server.connect(&Streams { jobs_max_bytes: 2 << 30, ..streams() }).await;
    let error = bus.ensure_streams().await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("MILLRACE_V1_JOBS") && text.contains("[streams]"), "{text}");
    assert_eq!(error.kind(), Kind::Fatal);
}
