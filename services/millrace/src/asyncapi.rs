//! The AsyncAPI 3.0 document of the public subjects, generated from the wire types and the default configuration.
//! `docs/asyncapi.json` is its committed copy; a test here compares them.
//!
//! The document is written from the service's side, as AsyncAPI 3 wants it: Millrace *receives* jobs and *sends*
//! output. AsyncAPI's NATS binding knows queue groups only, so JetStream's facts stand in `x-jetstream`.

use millrace_protocol::subjects::Subjects;
use millrace_protocol::{Class, ErrorCode, JobRequest, OutputChunk, SCHEMA_VERSION};
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Value, json};

/// Subject token that stands for a parameter while addresses are built by the real grammar.
const JOB: &str = "JOB-PARAMETER";
const MODEL: &str = "MODEL-PARAMETER";

/// The document, pretty-printed, with a newline at its end.
///
/// # Errors
/// Only if a built-in name were not a subject token or JSON could not be written.
pub fn document_text() -> anyhow::Result<String> {
    Ok(format!("{}\n", serde_json::to_string_pretty(&document()?)?))
}

/// The document.
///
/// # Errors
/// See [`document_text`].
pub fn document() -> anyhow::Result<Value> {
    let subjects = Subjects::new("millrace")?;
    Ok(json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Millrace",
            "version": format!("{SCHEMA_VERSION}.0.0"),
            "description": "Publish a job as one JSON document on NATS; read its answer as a stream of chunks. \
                Within a version fields are only ever added.",
            "license": { "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0" },
        },
        "defaultContentType": "application/json",
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "A nats-server with JetStream, 2.15.1 or later (`[nats] url` in pipeline.toml).",
            },
        },
        "channels": channels(&subjects)?,
        "operations": operations(),
        "components": components(),
    }))
}

fn channels(subjects: &Subjects) -> anyhow::Result<Value> {
    let job = millrace_protocol::JobId::new(JOB)?;
    let model = millrace_protocol::ModelName::new(MODEL)?;
    let address = |subject: String| subject.replace(JOB, "{job}").replace(MODEL, "{model}");
    let job_address = address(subjects.job(Class::Interactive, &model, &job)).replace(".interactive.", ".{class}.");
    Ok(json!({
        "jobs": {
            "address": job_address,
            "title": "Jobs",
            "description": "Publish with JetStream and wait for the acknowledgement: then the job is stored and will end \
                in exactly one final message. Publishing the same id again starts nothing twice.",
            "parameters": {
                "class": {
                    "description": "Who waits: decides which consumer pulls the job.",
                    "enum": Class::ALL.map(Class::as_str),
                    "default": Class::default().as_str(),
                },
                "model": parameter("Name under which the model is served."),
                "job": parameter("The job's id, chosen by the publisher."),
            },
            "messages": { "job": { "$ref": "#/components/messages/job" } },
            "x-jetstream": {
                "stream": subjects.jobs_stream(),
                "subjects": [subjects.jobs_all()],
                "retention": "workqueue",
                "discard": "new",
                "consumers": "one durable per class, explicit acknowledgement",
                "mediaBucket": subjects.media_bucket(),
                "errors": {
                    "10077": "the queue is full: try again later",
                    "10054": "the message is larger than allowed: put media into the media bucket",
                },
            },
        },
        "out": {
            "address": address(subjects.out(&job)),
            "title": "Output of one job",
            "description": "Claims, deltas and exactly one final, in order. Stored before they are shown, so a reader may \
                start at any time and go on from the last sequence it saw.",
            "parameters": { "job": parameter("The job's id.") },
            "messages": { "chunk": { "$ref": "#/components/messages/chunk" } },
            "x-jetstream": {
                "stream": subjects.out_stream(),
                "subjects": [subjects.out_all()],
                "retention": "limits",
                "fence": "Nats-Expected-Last-Subject-Sequence",
                "read": "an ordered consumer filtered to the subject, from its first message",
            },
        },
        "cancel": {
            "address": address(subjects.cancel(&job)),
            "title": "Cancellation of one job",
            "description": "Core NATS: reaches a job that runs now. For jobs that still wait, also put the key {job} into \
                the cancellation bucket. The job then ends in a final with status `cancelled`.",
            "parameters": { "job": parameter("The job's id.") },
            "messages": { "cancel": { "$ref": "#/components/messages/cancel" } },
            "x-jetstream": { "keyValueBucket": subjects.cancel_bucket() },
        },
        "deadLetters": {
            "address": address(subjects.dead_letter("LABEL-PARAMETER", JOB)).replace("LABEL-PARAMETER", "{label}"),
            "title": "Dead letters",
            "description": "Jobs that ended for a reason worth a person's look: the job document as it was published.",
            "parameters": {
                "label": {
                    "description": "Error code.",
                    "enum": ErrorCode::ALL.iter().map(|code| code.as_str()).collect::<Vec<_>>(),
                },
                "job": parameter("The job's id."),
            },
            "messages": { "job": { "$ref": "#/components/messages/job" } },
            "x-jetstream": {
                "stream": subjects.dead_letter_stream(),
                "subjects": [subjects.dead_letters_all()],
                "retention": "limits",
            },
        },
    }))
}

fn parameter(description: &str) -> Value {
    json!({ "description": format!("{description} One subject token: A-Z a-z 0-9 - _, at most 128 characters.") })
}

fn operations() -> Value {
    let operation = |action: &str, channel: &str, summary: &str| json!({ "action": action, "channel": { "$ref": format!("#/channels/{channel}") }, "summary": summary });
    json!({
        "receiveJob": operation("receive", "jobs", "Takes a job."),
        "sendOutput": operation("send", "out", "Sends a job's answer, chunk by chunk."),
        "receiveCancel": operation("receive", "cancel", "Cancels a job."),
        "sendDeadLetter": operation("send", "deadLetters", "Keeps a job that needs a person's look."),
    })
}

fn components() -> Value {
    let mut generator: SchemaGenerator = SchemaSettings::draft07()
        .with(|settings| settings.definitions_path = "/components/schemas".into())
        .into_generator();
    let job = generator.subschema_for::<JobRequest>();
    let chunk = generator.subschema_for::<OutputChunk>();
    let schemas = generator.take_definitions(true);
    json!({
        "messages": {
            "job": {
                "name": "job",
                "title": "Job",
                "contentType": "application/json",
                "headers": { "$ref": "#/components/schemas/JobHeaders" },
                "payload": job,
                "examples": [job_example()],
            },
            "chunk": {
                "name": "chunk",
                "title": "Output chunk",
                "contentType": "application/json",
                "payload": chunk,
            },
            "cancel": {
                "name": "cancel",
                "title": "Cancellation",
                "summary": "The subject says it all; the payload is empty.",
                "payload": { "type": "string", "maxLength": 0 },
            },
        },
        "schemas": with_headers(schemas),
    })
}

fn with_headers(mut schemas: serde_json::Map<String, Value>) -> Value {
    let headers = json!({
        "type": "object",
        "properties": {
            "Nats-Msg-Id": { "type": "string", "description": "The job's id: a second publish of it is not stored." },
            "traceparent": { "type": "string", "description": "W3C trace context, kept through all actors." },
        },
    });
    schemas.insert("JobHeaders".to_string(), headers);
    Value::Object(schemas)
}

fn job_example() -> Value {
    json!({
        "name": "caption",
        "summary": "Caption the first eight seconds of a clip in the media bucket.",
        "headers": { "Nats-Msg-Id": "clip-42-0" },
        "payload": {
            "id": "clip-42-0",
            "model": "demo",
            "messages": [{ "role": "user", "content": [
                { "type": "video", "object": "clip-42.mp4", "media_type": "video/mp4", "start_secs": 0.0, "end_secs": 8.0 },
                { "type": "text", "text": "Describe the video." },
            ]}],
            "sampling": { "temperature": 0.0 },
            "max_tokens": 64,
        },
    })
}

#[cfg(test)]
#[path = "asyncapi_tests.rs"]
mod tests;
