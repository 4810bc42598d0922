//! `pipeline.toml` as written: texts and numbers, nothing checked but names and types. The defaults stand here.

use schemars::JsonSchema;
use serde::Deserialize;

macro_rules! table {
    ($(#[$doc:meta])* $name:ident { $($key:ident: $kind:ty = $default:expr,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
        #[serde(default, deny_unknown_fields)]
        #[allow(missing_docs)] // Every key is documented in pipeline.toml, which a test holds complete.
        pub struct $name { $(pub $key: $kind,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($key: $default.into(),)* }
            }
        }
    };
}

table! {
    /// The whole file.
    Config {
        nats: Nats = Nats::default(),
        streams: Streams = Streams::default(),
        models: Vec<Model> = vec![Model::default()],
        preprocess: Preprocess = Preprocess::default(),
        pager: Pager = Pager::default(),
        scheduler: Scheduler = Scheduler::default(),
        executor: Executor = Executor::default(),
        telemetry: Telemetry = Telemetry::default(),
        drain: Drain = Drain::default(),
    }
}

table! {
    /// `[nats]`
    Nats {
        url: String = "auto",
        server_path: String = "",
        store_dir: String = "",
        credentials: String = "",
        prefix: String = "millrace",
        request_timeout: String = "5s",
        max_payload: String = "8MiB",
    }
}

table! {
    /// `[streams]`
    Streams {
        mode: String = "create",
        storage: String = "file",
        replicas: u32 = 1_u32,
        jobs_max_bytes: String = "1GiB",
        jobs_max_messages: u64 = 100_000_u64,
        job_max_bytes: String = "7MiB",
        out_max_bytes: String = "1GiB",
        out_max_age: String = "24h",
        dlq_max_bytes: String = "128MiB",
        dlq_max_age: String = "14d",
        media_max_bytes: String = "2GiB",
        media_max_age: String = "24h",
        cancel_max_age: String = "24h",
        duplicate_window: String = "1h",
        ack_wait: String = "10s",
        max_attempts: u32 = 5_u32,
        max_ack_pending: u32 = 1_024_u32,
    }
}

table! {
    /// One `[[models]]` entry.
    Model {
        name: String = "demo",
        path: String = "deploy/demo/model",
        default: bool = true,
    }
}

table! {
    /// `[preprocess]`
    Preprocess {
        credits_interactive: u32 = 32_u32,
        credits_batch: u32 = 16_u32,
        credits_stream: u32 = 16_u32,
        threads: u32 = 0_u32,
        file_roots: Vec<String> = Vec::<String>::new(),
        ffmpeg: String = "ffmpeg",
        ffprobe: String = "ffprobe",
        video_prompt: String = "nested",
        patches: String = "normalised",
        limits: Limits = Limits::default(),
    }
}

table! {
    /// `[preprocess.limits]`
    Limits {
        max_image_pixels: u64 = 64_000_000_u64,
        max_image_bytes: String = "32MiB",
        max_video_bytes: String = "1GiB",
        max_video_secs: u64 = 3_600_u64,
        max_frames: u32 = 768_u32,
        decode_timeout: String = "60s",
    }
}

table! {
    /// `[pager]`
    Pager {
        ram_bytes: String = "512MiB",
        disk_bytes: String = "4GiB",
        dir: String = "",
        lease: String = "30s",
    }
}

table! {
    /// `[scheduler]`
    Scheduler {
        step_tokens: u32 = 2_048_u32,
        max_sequences: u32 = 64_u32,
        run_ahead: u32 = 2_u32,
        waiting: u32 = 64_u32,
        default_max_tokens: u32 = 512_u32,
        watermark_blocks: u32 = 4_u32,
        prefix_cache: bool = true,
        ageing: String = "10s",
        tenant_weights: Vec<String> = Vec::<String>::new(),
        step_timeout: String = "60s",
        coalesce: String = "200ms",
    }
}

table! {
    /// `[executor]`
    Executor {
        device: String = "auto",
        dtype: String = "auto",
        kv_bytes: String = "auto",
        block_tokens: u32 = 16_u32,
        slots: u32 = 64_u32,
        step_tokens: u32 = 2_048_u32,
        step_patches: u32 = 16_384_u32,
        swap_bytes: String = "256MiB",
        encoder_host_bytes: String = "256MiB",
        threads: u32 = 0_u32,
    }
}

table! {
    /// `[telemetry]`
    Telemetry {
        listen: String = "127.0.0.1:0",
        log_format: String = "text",
        log_filter: String = "info",
    }
}

table! {
    /// `[drain]`
    Drain {
        timeout: String = "30s",
    }
}
