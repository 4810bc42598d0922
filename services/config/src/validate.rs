//! Raw to validated, table by table, by exhaustive destructuring: a new key does not compile until it is handled.
//! Collects every problem before it gives up.

use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use millrace_protocol::ModelName;
use millrace_protocol::subjects::Subjects;

use crate::environment::Environment;
use crate::error::{ConfigError, Invalid};
use crate::sections::{
    Config, DeviceChoice, Drain, Dtype, Executor, LogFormat, MediaLimits, Model, Nats, NatsUrl, Pager, PatchForm,
    Preprocess, Scheduler, Storage, StreamMode, Streams, Telemetry, VideoPrompt,
};
use crate::{raw, units};

const SECOND: Duration = Duration::from_secs(1);
/// Largest share of a tenant, against 1 for one that is not named.
const MOST_WEIGHT: u32 = 1_000;
const DAY: Duration = Duration::from_secs(86_400);
/// Keys and values of one token in a very small model: two layers of one 64-wide head in bf16, and their float32 twin.
const LEAST_KV_BYTES_PER_TOKEN: u64 = 1_024;
/// What a plan weighs at most: its head and one newcomer, each running sequence, each new block.
const PLAN_HEAD_BYTES: u64 = 4_096;
const PLAN_BYTES_PER_SEQUENCE: u64 = 51;
const PLAN_BYTES_PER_BLOCK: u64 = 27;
/// Sizes a stream can have.
const STREAM_BYTES: RangeInclusive<u64> = 64 << 10..=1 << 50;
/// Room for headers and subject beside a job's document in one message.
const HEADER_ROOM_BYTES: u64 = 64 << 10;

/// Validates everything; environment values win over the file's.
pub(crate) fn config(raw: raw::Config, environment: &Environment) -> Result<Config, ConfigError> {
    let raw::Config { nats, streams, models, preprocess, pager, scheduler, executor, telemetry, drain } = raw;
    let mut problems = Problems::default();
    let config = Config {
        nats: self::nats(nats, environment, &mut problems),
        streams: self::streams(streams, &mut problems),
        models: self::models(models, &mut problems),
        preprocess: self::preprocess(preprocess, &mut problems),
        pager: self::pager(pager, environment, &mut problems),
        scheduler: self::scheduler(scheduler, &mut problems),
        executor: self::executor(executor, environment, &mut problems),
        telemetry: self::telemetry(telemetry, environment, &mut problems),
        drain: self::drain(drain, &mut problems),
    };
    contradictions(&config, &mut problems);
    if problems.found.is_empty() {
        return Ok(config);
    }
    Err(ConfigError::Invalid { path: None, problems: problems.found })
}

#[derive(Default)]
struct Problems {
    found: Vec<Invalid>,
    table: &'static str,
}

impl Problems {
    fn add(&mut self, key: &str, message: impl Into<String>) {
        self.found.push(Invalid { table: self.table.to_string(), key: key.to_string(), message: message.into() });
    }

    /// The value, or a stand-in that is never used because the problem is reported.
    fn take<T>(&mut self, key: &str, value: Result<T, String>, stand_in: T) -> T {
        value.unwrap_or_else(|message| {
            self.add(key, message);
            stand_in
        })
    }

    fn bytes(&mut self, key: &str, text: &str, range: RangeInclusive<u64>) -> u64 {
        let bytes = self.take(key, units::bytes(text), *range.start());
        if !range.contains(&bytes) {
            self.add(key, format!("must be between {} and {} bytes, not `{text}`", range.start(), range.end()));
        }
        bytes
    }

    fn duration(&mut self, key: &str, text: &str, range: RangeInclusive<Duration>) -> Duration {
        let value = self.take(key, units::duration(text), *range.start());
        if !range.contains(&value) {
            self.add(key, format!("must be between {:?} and {:?}, not `{text}`", range.start(), range.end()));
        }
        value
    }

    fn number<N: Copy + PartialOrd + std::fmt::Display>(&mut self, key: &str, value: N, range: RangeInclusive<N>) -> N {
        if !range.contains(&value) {
            self.add(key, format!("must be between {} and {}, not {value}", range.start(), range.end()));
        }
        value
    }

    fn choice<T: Copy>(&mut self, key: &str, text: &str, choices: &[(&str, T)]) -> T {
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
            return *value;
        }
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        self.add(key, format!("must be {}, not \"{text}\"", names.join(" or ")));
        choices[0].1
    }

    fn not_empty(&mut self, key: &str, text: String) -> String {
        if text.trim().is_empty() {
            self.add(key, "must not be empty");
        }
        text
    }
}

fn path(text: String) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

/// Thread and credit counts: a u32 always fits where this service runs.
fn count(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn nats(raw: raw::Nats, environment: &Environment, problems: &mut Problems) -> Nats {
    let raw::Nats { url, server_path, store_dir, credentials, prefix, request_timeout, max_payload } = raw;
    problems.table = "nats";
    let url = match environment.nats_url.clone().unwrap_or(url).as_str() {
        "auto" => NatsUrl::Auto,
        "managed" => NatsUrl::Managed,
        text => {
            let schemes = ["nats://", "tls://", "ws://", "wss://"];
            if !schemes.iter().any(|scheme| text.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty())) {
                problems.add("url", format!("must be \"auto\", \"managed\" or nats://HOST:PORT, not \"{text}\""));
            }
            NatsUrl::Url(text.to_string())
        }
    };
    if let Err(error) = Subjects::new(&prefix) {
        problems.add("prefix", error.to_string());
    }
    Nats {
        url,
        server_path: environment.nats_server.clone().or_else(|| path(server_path)),
        store_dir: environment
            .nats_store_dir
            .clone()
            .or_else(|| path(store_dir))
            .unwrap_or_else(|| environment.state_dir("nats")),
        credentials: path(credentials),
        prefix,
        request_timeout: problems.duration("request_timeout", &request_timeout, SECOND / 10..=SECOND * 300),
        max_payload_bytes: problems.bytes("max_payload", &max_payload, 128 << 10..=64 << 20),
    }
}

fn streams(raw: raw::Streams, problems: &mut Problems) -> Streams {
    let raw::Streams {
        mode,
        storage,
        replicas,
        jobs_max_bytes,
        jobs_max_messages,
        job_max_bytes,
        out_max_bytes,
        out_max_age,
        dlq_max_bytes,
        dlq_max_age,
        media_max_bytes,
        media_max_age,
        cancel_max_age,
        duplicate_window,
        ack_wait,
        max_attempts,
        max_ack_pending,
    } = raw;
    problems.table = "streams";
    let kept = SECOND..=DAY * 3_650;
    Streams {
        mode: problems.choice("mode", &mode, &[("create", StreamMode::Create), ("verify", StreamMode::Verify)]),
        storage: problems.choice("storage", &storage, &[("file", Storage::File), ("memory", Storage::Memory)]),
        replicas: count(problems.number("replicas", replicas, 1..=5)),
        jobs_max_bytes: problems.bytes("jobs_max_bytes", &jobs_max_bytes, STREAM_BYTES),
        jobs_max_messages: problems.number("jobs_max_messages", jobs_max_messages, 1..=1 << 40),
        job_max_bytes: problems.bytes("job_max_bytes", &job_max_bytes, 1 << 10..=64 << 20),
        out_max_bytes: problems.bytes("out_max_bytes", &out_max_bytes, STREAM_BYTES),
        out_max_age: problems.duration("out_max_age", &out_max_age, kept.clone()),
        dlq_max_bytes: problems.bytes("dlq_max_bytes", &dlq_max_bytes, STREAM_BYTES),
        dlq_max_age: problems.duration("dlq_max_age", &dlq_max_age, kept.clone()),
        media_max_bytes: problems.bytes("media_max_bytes", &media_max_bytes, STREAM_BYTES),
        media_max_age: problems.duration("media_max_age", &media_max_age, kept.clone()),
        cancel_max_age: problems.duration("cancel_max_age", &cancel_max_age, kept.clone()),
        duplicate_window: problems.duration("duplicate_window", &duplicate_window, kept),
        ack_wait: problems.duration("ack_wait", &ack_wait, SECOND / 2..=SECOND * 3_600),
        max_attempts: problems.number("max_attempts", max_attempts, 1..=1_000),
        max_ack_pending: problems.number("max_ack_pending", max_ack_pending, 1..=1_000_000),
    }
}

fn models(raw: Vec<raw::Model>, problems: &mut Problems) -> Vec<Model> {
    problems.table = "models";
    let mut seen = HashSet::new();
    let mut models = Vec::with_capacity(raw.len());
    for raw::Model { name, path, default } in raw {
        let path = problems.not_empty("path", path);
        if !seen.insert(name.clone()) {
            problems.add("name", format!("\"{name}\" is used twice"));
        }
        match ModelName::new(name) {
            Ok(name) => models.push(Model { name, path, default }),
            Err(error) => problems.add("name", error.to_string()),
        }
    }
    if models.iter().filter(|model| model.default).count() > 1 {
        problems.add("default", "is true for more than one model");
    }
    models
}

fn preprocess(raw: raw::Preprocess, problems: &mut Problems) -> Preprocess {
    let raw::Preprocess {
        credits_interactive,
        credits_batch,
        credits_stream,
        threads,
        file_roots,
        ffmpeg,
        ffprobe,
        video_prompt,
        patches,
        limits,
    } = raw;
    problems.table = "preprocess";
    for root in file_roots.iter().filter(|root| !root.starts_with('/')) {
        problems.add("file_roots", format!("must hold absolute folders, not \"{root}\""));
    }
    let patch_forms = [("normalised", PatchForm::Normalised), ("bytes", PatchForm::Bytes)];
    let video_prompts = [("nested", VideoPrompt::Nested), ("plain", VideoPrompt::Plain)];
    Preprocess {
        credits_interactive: count(problems.number("credits_interactive", credits_interactive, 1..=100_000)),
        credits_batch: count(problems.number("credits_batch", credits_batch, 1..=100_000)),
        credits_stream: count(problems.number("credits_stream", credits_stream, 1..=100_000)),
        threads: count(problems.number("threads", threads, 0..=1_024)),
        file_roots: file_roots.into_iter().map(PathBuf::from).collect(),
        ffmpeg: PathBuf::from(problems.not_empty("ffmpeg", ffmpeg)),
        ffprobe: PathBuf::from(problems.not_empty("ffprobe", ffprobe)),
        video_prompt: problems.choice("video_prompt", &video_prompt, &video_prompts),
        patches: problems.choice("patches", &patches, &patch_forms),
        limits: media_limits(limits, problems),
    }
}

fn media_limits(raw: raw::Limits, problems: &mut Problems) -> MediaLimits {
    let raw::Limits { max_image_pixels, max_image_bytes, max_video_bytes, max_video_secs, max_frames, decode_timeout } =
        raw;
    problems.table = "preprocess.limits";
    MediaLimits {
        max_image_pixels: problems.number("max_image_pixels", max_image_pixels, 1..=1 << 32),
        max_image_bytes: problems.bytes("max_image_bytes", &max_image_bytes, 1..=4 << 30),
        max_video_bytes: problems.bytes("max_video_bytes", &max_video_bytes, 1..=1 << 40),
        max_video_secs: problems.number("max_video_secs", max_video_secs, 1..=86_400),
        max_frames: problems.number("max_frames", max_frames, 1..=100_000),
        decode_timeout: problems.duration("decode_timeout", &decode_timeout, SECOND / 10..=SECOND * 3_600),
    }
}

fn pager(raw: raw::Pager, environment: &Environment, problems: &mut Problems) -> Pager {
    let raw::Pager { ram_bytes, disk_bytes, dir, lease } = raw;
    problems.table = "pager";
    Pager {
        ram_bytes: problems.bytes("ram_bytes", &ram_bytes, 1 << 20..=1 << 50),
        disk_bytes: problems.bytes("disk_bytes", &disk_bytes, 0..=1 << 50),
        dir: path(dir).unwrap_or_else(|| environment.state_dir("pages")),
        lease: problems.duration("lease", &lease, SECOND..=DAY),
    }
}

fn scheduler(raw: raw::Scheduler, problems: &mut Problems) -> Scheduler {
    let raw::Scheduler {
        step_tokens,
        max_sequences,
        run_ahead,
        waiting,
        default_max_tokens,
        watermark_blocks,
        prefix_cache,
        ageing,
        tenant_weights,
        step_timeout,
        coalesce,
    } = raw;
    problems.table = "scheduler";
    Scheduler {
        step_tokens: problems.number("step_tokens", step_tokens, 1..=1 << 20),
        max_sequences: problems.number("max_sequences", max_sequences, 1..=1 << 16),
        run_ahead: problems.number("run_ahead", run_ahead, 1..=8),
        waiting: problems.number("waiting", waiting, 0..=1 << 20),
        default_max_tokens: problems.number("default_max_tokens", default_max_tokens, 1..=1 << 24),
        watermark_blocks: problems.number("watermark_blocks", watermark_blocks, 0..=1 << 20),
        prefix_cache,
        ageing: problems.duration("ageing", &ageing, Duration::ZERO..=SECOND * 86_400),
        tenant_weights: problems.take("tenant_weights", self::tenant_weights(&tenant_weights), BTreeMap::new()),
        step_timeout: problems.duration("step_timeout", &step_timeout, SECOND..=SECOND * 3_600),
        coalesce: problems.duration("coalesce", &coalesce, Duration::ZERO..=SECOND * 60),
    }
}

/// `NAME=WEIGHT` each: the last `=` separates, since names of tenants are free.
fn tenant_weights(pairs: &[String]) -> Result<BTreeMap<String, u32>, String> {
    let mut weights = BTreeMap::new();
    for pair in pairs {
        let form = || format!("must hold \"TENANT=WEIGHT\" with a weight of 1 to {MOST_WEIGHT}, not \"{pair}\"");
        let (tenant, weight) = pair.rsplit_once('=').ok_or_else(form)?;
        let weight = weight.parse().ok().filter(|weight| (1..=MOST_WEIGHT).contains(weight)).ok_or_else(form)?;
        if weights.insert(tenant.to_owned(), weight).is_some() {
            return Err(format!("names tenant \"{tenant}\" twice"));
        }
    }
    Ok(weights)
}

fn executor(raw: raw::Executor, environment: &Environment, problems: &mut Problems) -> Executor {
    let raw::Executor {
        device,
        dtype,
        kv_bytes,
        block_tokens,
        slots,
        step_tokens,
        step_patches,
        swap_bytes,
        encoder_host_bytes,
        threads,
    } = raw;
    problems.table = "executor";
    let device = environment.device.clone().unwrap_or(device);
    let dtypes = [("auto", Dtype::Auto), ("bf16", Dtype::Bf16), ("f32", Dtype::F32)];
    Executor {
        device: problems.take("device", DeviceChoice::parse(&device), DeviceChoice::Auto),
        dtype: problems.choice("dtype", &dtype, &dtypes),
        kv_bytes: (kv_bytes != "auto").then(|| problems.bytes("kv_bytes", &kv_bytes, 1 << 20..=1 << 50)),
        block_tokens: problems.number("block_tokens", block_tokens, 1..=1_024),
        slots: problems.number("slots", slots, 1..=1 << 16),
        step_tokens: problems.number("step_tokens", step_tokens, 1..=1 << 20),
        step_patches: problems.number("step_patches", step_patches, 4..=1 << 24),
        swap_bytes: problems.bytes("swap_bytes", &swap_bytes, 0..=1 << 50),
        encoder_host_bytes: problems.bytes("encoder_host_bytes", &encoder_host_bytes, 0..=1 << 50),
        threads: count(problems.number("threads", threads, 0..=1_024)),
    }
}

fn telemetry(raw: raw::Telemetry, environment: &Environment, problems: &mut Problems) -> Telemetry {
    let raw::Telemetry { listen, log_format, log_filter } = raw;
    problems.table = "telemetry";
    let listen = environment.listen.clone().unwrap_or(listen);
    let address = listen.parse().map_err(|_| format!("must be IP:PORT such as \"127.0.0.1:0\", not \"{listen}\""));
    let log_format = environment.log_format.clone().unwrap_or(log_format);
    Telemetry {
        listen: problems.take("listen", address, ([127, 0, 0, 1], 0).into()),
        log_format: problems.choice("log_format", &log_format, &[("text", LogFormat::Text), ("json", LogFormat::Json)]),
        log_filter: problems.not_empty("log_filter", environment.log_filter.clone().unwrap_or(log_filter)),
    }
}

fn drain(raw: raw::Drain, problems: &mut Problems) -> Drain {
    let raw::Drain { timeout } = raw;
    problems.table = "drain";
    Drain { timeout: problems.duration("timeout", &timeout, Duration::ZERO..=DAY) }
}

/// Values that are fine alone and not together.
fn contradictions(config: &Config, problems: &mut Problems) {
    let Config { nats, streams, preprocess, pager, scheduler, executor, .. } = config;
    problems.table = "streams";
    let largest_job = nats.max_payload_bytes.saturating_sub(HEADER_ROOM_BYTES);
    if streams.job_max_bytes > largest_job && !matches!(nats.url, NatsUrl::Url(_)) {
        problems.add(
            "job_max_bytes",
            format!("must leave 64 KiB of [nats] max_payload for headers: at most {largest_job} bytes"),
        );
    }
    if streams.job_max_bytes > streams.jobs_max_bytes {
        problems.add("job_max_bytes", "must not be larger than jobs_max_bytes");
    }
    let credits = preprocess.credits_interactive.max(preprocess.credits_batch).max(preprocess.credits_stream);
    if count(streams.max_ack_pending) < credits {
        problems.add("max_ack_pending", format!("must be at least the largest of the [preprocess] credits, {credits}"));
    }
    problems.table = "pager";
    if pager.lease < streams.ack_wait {
        problems.add("lease", "must not be shorter than [streams] ack_wait, or pages vanish under running jobs");
    }
    problems.table = "scheduler";
    if scheduler.max_sequences > scheduler.step_tokens {
        problems.add("max_sequences", "must not exceed step_tokens: every running sequence takes a token of each step");
    }
    let plan_bytes = PLAN_HEAD_BYTES
        + PLAN_BYTES_PER_SEQUENCE * u64::from(scheduler.max_sequences)
        + PLAN_BYTES_PER_BLOCK * u64::from(scheduler.step_tokens / executor.block_tokens.max(1));
    if plan_bytes > nats.max_payload_bytes && !matches!(nats.url, NatsUrl::Url(_)) {
        problems.add(
            "max_sequences",
            format!("with step_tokens may need plans of {plan_bytes} bytes, more than [nats] max_payload"),
        );
    }
    problems.table = "executor";
    let block_bytes = (u64::from(executor.block_tokens) * LEAST_KV_BYTES_PER_TOKEN).max(1);
    let most_blocks = executor.kv_bytes.map(|bytes| bytes / block_bytes);
    if most_blocks.is_some_and(|blocks| blocks < 2) {
        problems.add("kv_bytes", "cannot hold two blocks of block_tokens tokens of even the smallest model");
    } else if let Some(blocks) = most_blocks.filter(|blocks| u64::from(scheduler.watermark_blocks) >= *blocks) {
        problems.table = "scheduler";
        problems.add("watermark_blocks", format!("must be below the pool's blocks, {blocks} at most by kv_bytes"));
        problems.table = "executor";
    }
    if executor.slots > executor.step_tokens {
        problems.add("slots", "must not exceed step_tokens: every running sequence takes a token of each step");
    }
}
