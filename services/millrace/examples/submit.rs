//! A publisher in Rust that knows nothing of Millrace but the documented message (docs/asyncapi.json): publishes one job
//! with a file in it and prints the answer as it streams. Needs async-nats, futures, serde_json and base64.
//!
//!     cargo run -p millrace --example submit -- nats://127.0.0.1:4222 demo photo.png "Describe the image."
//!
//! Files above 512 KiB belong in the media bucket MILLRACE_V1_MEDIA, and `"object": NAME` in the place of `"data"`.

#![allow(clippy::print_stdout)] // The answer is what an example has to say.

use anyhow::{Context, bail};
use async_nats::jetstream;
use async_nats::jetstream::consumer::pull::OrderedConfig;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt;
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, model, path, prompt] = arguments.as_slice() else {
        bail!("usage: submit NATS_URL MODEL FILE PROMPT");
    };
    let client = async_nats::connect(url).await?;
    let stream = jetstream::new(client.clone());

    // One subject token that no other job has: letters, digits, - and _.
    let id = format!("example-{}", client.new_inbox().replace('.', "-"));
    let kind = if [".mp4", ".mkv", ".webm"].iter().any(|end| path.ends_with(end)) { "video" } else { "image" };
    let data = STANDARD.encode(std::fs::read(path).with_context(|| path.clone())?);
    let job = json!({
        "messages": [{ "role": "user", "content": [
            { "type": kind, "data": data },
            { "type": "text", "text": prompt },
        ]}],
        "sampling": { "temperature": 0.0 },
        "max_tokens": 128,
    });

    // Stored when the acknowledgement is here. The id is the idempotency key: publishing it again starts nothing twice.
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Msg-Id", id.as_str());
    let subject = format!("millrace.v1.jobs.interactive.{model}.{id}");
    stream.publish_with_headers(subject, headers, job.to_string().into()).await?.await?;

    // The output is a stored log: an ordered consumer reads it from its start and misses nothing.
    let config = OrderedConfig { filter_subject: format!("millrace.v1.out.{id}"), ..OrderedConfig::default() };
    let output = stream.get_stream("MILLRACE_V1_OUT").await?.create_consumer(config).await?;
    let mut messages = output.messages().await?;
    while let Some(message) = messages.next().await {
        let chunk: Value = serde_json::from_slice(&message?.payload)?;
        match chunk["kind"].as_str() {
            Some("delta") => print!("{}", chunk["text"].as_str().unwrap_or_default()),
            Some("final") if chunk["status"] == "done" => {
                println!();
                return Ok(());
            }
            Some("final") => bail!("{}: {}", chunk["status"], chunk["error"]),
            // A claim: somebody works on it. Kinds added later are none of this reader's business.
            _ => {}
        }
    }
    bail!("the output ended without a final message")
}
