//! Bad input: each case ends in exactly one terminal message with its stable code, nothing stays queued, others go on.

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use millrace_bus::BusError;
use millrace_protocol::{Class, ErrorCode, Status};
use millrace_tests::cluster::{Cluster, MODEL};
use millrace_tests::samples::committed;
use millrace_tests::workspace::root;
use serde_json::json;

fn user(parts: serde_json::Value) -> String {
    json!({"messages": [{"role": "user", "content": parts}]}).to_string()
}

fn image(bytes: &[u8], media_type: &str) -> String {
    user(json!([{"type": "image", "data": STANDARD.encode(bytes), "media_type": media_type}]))
}

fn video(bytes: &[u8]) -> String {
    user(json!([{"type": "video", "data": STANDARD.encode(bytes), "media_type": "video/mp4"}]))
}

/// A PNG header that promises 60,000 x 60,000 pixels, without any.
fn huge_png() -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    png.extend(60_000u32.to_be_bytes());
    png.extend(60_000u32.to_be_bytes());
    png.extend([8, 2, 0, 0, 0]);
    let crc = crc32(&png[12..]);
    png.extend(crc.to_be_bytes());
    png.extend(b"\0\0\0\0IDAT");
    png.extend(crc32(b"IDAT").to_be_bytes());
    png
}

/// CRC-32 of PNG (ISO 3309), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

fn cases() -> Result<Vec<(&'static str, String, ErrorCode)>> {
    let clips = root().join("deploy/demo/clips");
    let png = std::fs::read(clips.join("one-shape.png"))?;
    let jpeg = std::fs::read(clips.join("one-shape.jpg"))?;
    let mp4 = std::fs::read(clips.join("one-shape.mp4"))?;
    Ok(vec![
        ("not-json", "this is not JSON".into(), ErrorCode::BadRequest),
        ("not-an-object", "[1, 2]".into(), ErrorCode::BadRequest),
        ("unknown-key", json!({"prompt": "Hi", "max_token": 3}).to_string(), ErrorCode::BadRequest),
        ("other-id", json!({"prompt": "Hi", "id": "another"}).to_string(), ErrorCode::BadRequest),
        ("no-prompt", "{}".into(), ErrorCode::NoPrompt),
        ("two-prompts", json!({"prompt": "Hi", "prompt_token_ids": [1]}).to_string(), ErrorCode::NoPrompt),
        ("token-range", json!({"prompt_token_ids": [5, 9_999_999]}).to_string(), ErrorCode::TokenRange),
        (
            "temperature",
            json!({"prompt": "Hi", "sampling": {"temperature": -1.0}}).to_string(),
            ErrorCode::InvalidValue,
        ),
        ("priority", json!({"prompt": "Hi", "priority": 10}).to_string(), ErrorCode::InvalidValue),
        ("too-long", json!({"prompt": "a b ".repeat(20_000)}).to_string(), ErrorCode::ContextLength),
        ("no-base64", user(json!([{"type": "image", "data": "%%%"}])), ErrorCode::InvalidValue),
        ("no-source", user(json!([{"type": "image"}])), ErrorCode::InvalidValue),
        ("missing-object", user(json!([{"type": "image", "object": "nowhere"}])), ErrorCode::MediaMissing),
        ("outside-roots", user(json!([{"type": "image", "url": "file:///etc/hostname"}])), ErrorCode::MediaMissing),
        ("truncated-png", image(&png[..png.len() / 2], "image/png"), ErrorCode::MediaDecode),
        ("truncated-jpeg", image(&jpeg[..jpeg.len() / 3], "image/jpeg"), ErrorCode::MediaDecode),
        ("not-an-image", image(b"GARBAGE GARBAGE", "image/png"), ErrorCode::MediaType),
        ("wrong-type", image(&png, "image/jpeg"), ErrorCode::MediaType),
        ("huge-header", image(&huge_png(), "image/png"), ErrorCode::TooLarge),
        ("broken-video", video(&mp4[..mp4.len() / 4]), ErrorCode::MediaDecode),
        ("not-a-video", video(b"GARBAGE GARBAGE"), ErrorCode::MediaType),
        ("zero-frames", user(json!([{"type": "frames", "frames": [], "fps": 2.0}])), ErrorCode::InvalidValue),
        ("past-deadline", json!({"prompt": "Hi", "deadline_unix_ms": 1}).to_string(), ErrorCode::DeadlineExceeded),
    ])
}

#[tokio::test]
async fn every_bad_job_gets_one_terminal_message_and_good_ones_go_on() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let good = committed()?.remove(0);
    cluster.publish("good-before", &good.job()?).await?;
    let cases = cases()?;
    for (id, body, _) in &cases {
        cluster.publish_raw(Class::Batch, MODEL, id, body.clone().into()).await?;
    }
    cluster
        .publish_raw(Class::Batch, "no-such-model", "unknown-model", br#"{"prompt":"Hi"}"#.as_slice().into())
        .await?;
    let subject = format!("{}.extra.tokens", cluster.bus.subjects().jobs_all().replace('>', "batch.demo.job"));
    cluster.bus.publish(&subject, b"{}".as_slice().into()).await?;
    cluster.publish("good-after", &good.job()?).await?;

    for (id, _, code) in &cases {
        let (last, chunks) = cluster.finished(id).await?;
        let error = last.error.unwrap_or_else(|| panic!("{id} ended without an error"));
        assert_eq!(error.code, *code, "{id}: {error}");
        assert!(error.message.len() > 20, "{id}: {error} says too little");
        assert_eq!(chunks.len(), 1, "{id}");
        let expected = if *code == ErrorCode::DeadlineExceeded { Status::Expired } else { Status::Rejected };
        assert_eq!(last.status, expected, "{id}");
    }
    let (unknown, _) = cluster.finished("unknown-model").await?;
    assert_eq!(unknown.error.map(|error| error.code), Some(ErrorCode::UnknownModel));
    for id in ["good-before", "good-after"] {
        assert_eq!(cluster.finished(id).await?.0.text, good.text_f32);
    }
    assert_eq!(service.terminate().await?, 0);
    assert_eq!(cluster.queued().await?, 0, "nothing stays in the queue");
    let streams = cluster.bus.stream_status().await?;
    let letters = streams.iter().find(|stream| stream.name == cluster.bus.subjects().dead_letter_stream());
    assert_eq!(letters.map(|stream| stream.messages), Some(1), "the message without a job id is a dead letter");
    Ok(())
}

#[tokio::test]
async fn an_oversize_job_is_refused_before_it_is_sent() -> Result<()> {
    let cluster = Cluster::start().await?;
    let body = vec![b' '; 8 << 20];
    let refused = cluster.publish_raw(Class::Batch, MODEL, "large", body.into()).await.unwrap_err();
    let refused = refused.downcast::<BusError>()?;
    assert!(matches!(refused, BusError::TooLarge { .. }), "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_second_submission_gets_the_first_ones_answer() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let sample = committed()?.remove(0);
    assert!(!cluster.publish("twice", &sample.job()?).await?.duplicate);
    assert!(cluster.publish("twice", &sample.job()?).await?.duplicate);
    let (last, first) = cluster.finished("twice").await?;
    assert_eq!(last.text, sample.text_f32);
    // Without the id header the queue takes it again; the stored output still says that it ended.
    let subjects = cluster.bus.subjects();
    let subject = format!("{}.demo.twice", subjects.jobs_of_class(Class::Batch).trim_end_matches(".>"));
    cluster.bus.publish(&subject, serde_json::to_vec(&sample.job()?)?.into()).await?;
    cluster.publish("after", &sample.job()?).await?;
    cluster.finished("after").await?;
    assert_eq!(service.terminate().await?, 0);
    assert_eq!(cluster.queued().await?, 0);
    let (_, stored) = cluster.finished("twice").await?;
    assert_eq!(stored, first, "the second submission wrote nothing");
    Ok(())
}
