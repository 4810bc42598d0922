//! The table's form.

use millrace_bus::{ConsumerStatus, ServiceInfo, StreamStatus};
use millrace_protocol::engine::EngineSpec;
use millrace_protocol::{ActorId, Class, ModelName};

use super::*;

fn spec() -> EngineSpec {
    EngineSpec {
        model: ModelName::new("demo").unwrap(),
        weights_hash: "00".into(),
        blocks: 256,
        block_tokens: 16,
        slots: 8,
        step_tokens: 2048,
        step_patches: 16_384,
        max_tokens: 4096,
        vocab: 1024,
        device: "CPU, f32".into(),
    }
}

fn beacon(engine: Option<EngineSpec>, draining: bool) -> SchedulerBeacon {
    SchedulerBeacon {
        scheduler: ActorId::new("s-1").unwrap(),
        model: ModelName::new("demo").unwrap(),
        engine,
        free_jobs: 70,
        waiting: 0,
        running: 2,
        free_blocks: 200,
        prefixes: Default::default(),
        draining,
    }
}

#[test]
fn columns_line_up_and_empty_sections_say_so() {
    let snapshot = Snapshot {
        nats: "nats://127.0.0.1:4222".into(),
        services: vec![ServiceInfo {
            name: "millrace-scheduler".into(),
            id: "abc".into(),
            version: "0.1.0".into(),
            metadata: [("model".to_string(), "demo".to_string())].into(),
        }],
        schedulers: vec![beacon(Some(spec()), false)],
        executors: Vec::new(),
        streams: vec![StreamStatus {
            name: "MILLRACE_V1_JOBS".into(),
            messages: 3,
            bytes: 1_536,
            max_bytes: Some(1 << 30),
            last_seq: 9,
        }],
        consumers: vec![ConsumerStatus {
            class: Class::Batch,
            name: "batch".into(),
            pending: 3,
            ack_pending: 1,
            redelivered: 0,
            waiting_pulls: 1,
        }],
    };
    let expected = "\
NATS nats://127.0.0.1:4222

SERVICE             ID   VERSION
millrace-scheduler  abc  0.1.0    model=demo

MODEL  STATE  RUNNING  WAITING  ROOM FOR  KV BLOCKS FREE  DEVICE
demo   ready  2        0        70        200 of 256      CPU, f32

EXECUTOR  MODEL  HELD BY  STEPS
no executor

JOBS   QUEUED  IN WORK  REDELIVERED
batch  3       1        0

STREAM            MESSAGES  BYTES
MILLRACE_V1_JOBS  3         1.5 KiB  of 1.0 GiB
";
    assert_eq!(text(&snapshot), expected);
}

#[test]
fn a_scheduler_says_what_keeps_it_from_work() {
    assert_eq!(scheduler(&beacon(None, false))[1], "no executor");
    assert_eq!(scheduler(&beacon(Some(spec()), true))[1], "draining");
}

#[test]
fn bytes_have_three_digits() {
    for (count, text) in
        [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (150 << 10, "150 KiB"), (u64::MAX, "16777216 TiB")]
    {
        assert_eq!(bytes(count), text);
    }
}
