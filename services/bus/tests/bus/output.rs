//! The output log: its fence, its reads, and following it.

use std::time::Duration;

use millrace_bus::{AppendError, BusError};
use millrace_protocol::output::Final;
use millrace_protocol::{ActorId, Chunk, FinishReason, JobId, OutputChunk, Status};

use crate::support::{job, server, soon, streams};

fn chunk(job: &JobId, index: u64, chunk: Chunk) -> OutputChunk {
    OutputChunk { v: 1, job: job.clone(), index, chunk }
}

pub fn claim(job: &JobId, owner: &str) -> OutputChunk {
    chunk(job, 0, Chunk::Claim { owner: ActorId::new(owner).unwrap(), job_seq: 1, attempt: 1 })
}

pub fn delta(job: &JobId, index: u64) -> OutputChunk {
    let text = format!("word{index} ");
    chunk(job, index, Chunk::Delta { token_ids: vec![7], text, logprobs: vec![] })
}

pub fn end(job: &JobId, index: u64) -> OutputChunk {
    let last = Final { finish_reason: Some(FinishReason::Stop), ..Final::bare(Status::Done) };
    chunk(job, index, Chunk::Final(Box::new(last)))
}

#[tokio::test]
async fn a_stale_owner_cannot_write() {
    let server = server().await;
    let (old, new) = (server.bus(&streams()).await, server.connect(&streams()).await);
    let job = job("a");
    assert!(old.out_last(&job).await.unwrap().is_none());
    let claimed = old.append(&job, 0, &claim(&job, "old")).await.unwrap();
    let shown = old.append(&job, claimed, &delta(&job, 0)).await.unwrap();
    let (last, _) = new.out_last(&job).await.unwrap().unwrap();
    assert_eq!(last, shown);
    let taken = new.append(&job, last, &claim(&job, "new")).await.unwrap();
    // The same text from the old owner: refused although the content would fit.
    assert!(matches!(old.append(&job, shown, &delta(&job, 1)).await, Err(AppendError::Stale)));
    let next = new.append(&job, taken, &delta(&job, 1)).await.unwrap();
    assert!(matches!(old.append(&job, shown, &delta(&job, 1)).await, Err(AppendError::Stale)));
    new.append(&job, next, &end(&job, 2)).await.unwrap();
    let log: Vec<OutputChunk> = new.out_read(&job).await.unwrap().into_iter().map(|(_, chunk)| chunk).collect();
    let expected = [claim(&job, "old"), delta(&job, 0), claim(&job, "new"), delta(&job, 1), end(&job, 2)];
    assert_eq!(log, expected);
}

#[tokio::test]
async fn only_one_of_two_first_claims_wins() {
    let server = server().await;
    let (one, two) = (server.bus(&streams()).await, server.connect(&streams()).await);
    for round in 0..20 {
        let job = job(&format!("race-{round}"));
        let (claim_one, claim_two) = (claim(&job, "one"), claim(&job, "two"));
        let (first, second) = tokio::join!(one.append(&job, 0, &claim_one), two.append(&job, 0, &claim_two));
        assert_eq!(u8::from(first.is_ok()) + u8::from(second.is_ok()), 1, "{first:?} {second:?}");
    }
}

#[tokio::test]
async fn repeating_an_append_finds_the_stored_chunk() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let job = job("a");
    let claimed = bus.append(&job, 0, &claim(&job, "me")).await.unwrap();
    let stored = bus.append(&job, claimed, &delta(&job, 0)).await.unwrap();
    assert_eq!(bus.append(&job, claimed, &delta(&job, 0)).await.unwrap(), stored);
    assert!(matches!(bus.append(&job, claimed, &delta(&job, 9)).await, Err(AppendError::Stale)));
    assert_eq!(bus.out_read(&job).await.unwrap().len(), 2);
}

#[tokio::test]
async fn long_output_is_read_whole_and_in_order_among_other_jobs() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let writers = ["a", "b", "c"].map(|name| {
        let (bus, job) = (bus.clone(), job(name));
        tokio::spawn(async move {
            let mut last = bus.append(&job, 0, &claim(&job, "me")).await.unwrap();
            for index in 0..300 {
                last = bus.append(&job, last, &delta(&job, index)).await.unwrap();
            }
        })
    });
    for writer in writers {
        writer.await.unwrap();
    }
    for name in ["a", "b", "c"] {
        let log = bus.out_read(&job(name)).await.unwrap();
        assert_eq!(log.len(), 301);
        assert!(log.windows(2).all(|pair| pair[0].0 < pair[1].0));
        let indices = log[1..].iter().map(|(_, chunk)| chunk.index);
        assert!(indices.eq(0..300));
    }
    assert!(bus.out_read(&job("d")).await.unwrap().is_empty());
    assert_eq!(bus.requests_waiting(), 0);
}

#[tokio::test]
async fn an_oversized_chunk_is_refused_before_it_is_sent() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let job = job("a");
    let text = "x".repeat(bus.max_payload_bytes() + 1);
    let big = chunk(&job, 0, Chunk::Delta { token_ids: vec![], text, logprobs: vec![] });
    assert!(matches!(bus.append(&job, 0, &big).await, Err(AppendError::Bus(BusError::TooLarge { .. }))));
    assert!(bus.is_connected());
}

#[tokio::test]
async fn following_sees_what_is_stored_before_and_after_and_ends_with_the_final() {
    let server = server().await;
    let (writer, reader) = (server.bus(&streams()).await, server.connect(&streams()).await);
    let job = job("a");
    let mut last = writer.append(&job, 0, &claim(&job, "me")).await.unwrap();
    last = writer.append(&job, last, &delta(&job, 0)).await.unwrap();
    let mut follow = reader.follow(&job, 0).await.unwrap();
    let (first, seen) = soon(follow.next()).await.unwrap().unwrap();
    assert_eq!(seen, claim(&job, "me"));
    assert_eq!(soon(follow.next()).await.unwrap().unwrap().1, delta(&job, 0));
    last = writer.append(&job, last, &delta(&job, 1)).await.unwrap();
    assert_eq!(soon(follow.next()).await.unwrap().unwrap(), (last, delta(&job, 1)));
    let mut late = reader.follow(&job, first + 1).await.unwrap();
    writer.append(&job, last, &end(&job, 2)).await.unwrap();
    assert_eq!(soon(follow.next()).await.unwrap().unwrap().1, end(&job, 2));
    assert!(soon(follow.next()).await.is_none());
    let mut indices = Vec::new();
    while let Some(message) = soon(late.next()).await {
        indices.push(message.unwrap().1.index);
    }
    assert_eq!(indices, [0, 1, 2]);
}

#[tokio::test]
async fn a_follower_may_come_before_the_job() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    let job = job("a");
    let mut follow = bus.follow(&job, 0).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), follow.next()).await.is_err());
    bus.append(&job, 0, &end(&job, 0)).await.unwrap();
    assert_eq!(soon(follow.next()).await.unwrap().unwrap().1, end(&job, 0));
}
