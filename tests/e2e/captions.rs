//! Captions through NATS equal transformers' greedy text, whatever form the pages have.

use std::collections::BTreeSet;

use anyhow::Result;
use millrace_protocol::{Chunk, FinishReason, Status};
use millrace_tests::cluster::Cluster;
use millrace_tests::samples::committed;
use millrace_tests::service::Service;

/// All held-out samples at once, through separate processes, two of each kind that can stand twice.
#[tokio::test]
async fn every_committed_sample_gets_transformers_text_from_separate_actors() -> Result<()> {
    let cluster = Cluster::start().await?;
    let execute = [cluster.run("execute").await?, cluster.run("execute").await?];
    let schedule = [cluster.run("schedule").await?, cluster.run("schedule").await?];
    let preprocess = [cluster.run("preprocess").await?, cluster.run("preprocess").await?];
    let samples = committed()?;
    for sample in &samples {
        cluster.publish(&sample.id, &sample.job()?).await?;
    }
    for sample in &samples {
        let (last, _) = cluster.finished(&sample.id).await?;
        assert_eq!(last.status, Status::Done, "{}: {last:?}", sample.id);
        assert_eq!(last.text, sample.text_f32, "{} ({})", sample.id, sample.category);
        assert_eq!(last.usage.prompt_tokens, sample.input_ids.len() as u64, "{}", sample.id);
        assert_eq!(last.finish_reason, Some(FinishReason::Stop));
    }
    for service in preprocess.into_iter().chain(schedule).chain(execute) {
        assert_eq!(service.terminate().await?, 0);
    }
    assert_eq!(cluster.queued().await?, 0, "every job was acknowledged");
    Ok(())
}

/// Pages of bytes, which the executor normalises, give the same text: stills and clips.
#[tokio::test]
async fn pages_of_bytes_give_the_same_text() -> Result<()> {
    let cluster = Cluster::start().await?;
    let config = cluster.config("up", "[preprocess]\npatches = \"bytes\"\n")?;
    let service = Service::start(&["up"], &config).await?;
    let mut categories = BTreeSet::new();
    let samples: Vec<_> =
        committed()?.into_iter().filter(|sample| categories.insert(sample.category.clone())).collect();
    for sample in &samples {
        cluster.publish(&sample.id, &sample.job()?).await?;
    }
    for sample in &samples {
        let (last, _) = cluster.finished(&sample.id).await?;
        assert_eq!(last.text, sample.text_f32, "{} ({})", sample.id, sample.category);
    }
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}

/// One process does everything, and a streamed answer arrives in pieces that add up.
#[tokio::test]
async fn one_process_streams_an_answer_in_pieces() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let sample = committed()?.remove(0);
    cluster.publish("streamed", &sample.job()?).await?;
    let (last, chunks) = cluster.finished("streamed").await?;
    assert_eq!(last.text, sample.text_f32);
    let deltas = chunks.iter().filter(|chunk| matches!(chunk.chunk, Chunk::Delta { .. })).count();
    assert!(deltas >= 2, "{deltas} deltas");
    let mut quiet = sample.job()?;
    quiet.stream = false;
    cluster.publish("quiet", &quiet).await?;
    let (last, chunks) = cluster.finished("quiet").await?;
    assert_eq!(last.text, sample.text_f32);
    assert!(!chunks.iter().any(|chunk| matches!(chunk.chunk, Chunk::Delta { .. })));
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}
