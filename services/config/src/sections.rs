//! The validated configuration: plain values with units resolved. Reading and checking is elsewhere.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use millrace_protocol::{Class, ModelName};

/// Everything in `pipeline.toml`, checked.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // One field per table; the tables are documented below.
pub struct Config {
    pub nats: Nats,
    pub streams: Streams,
    pub models: Vec<Model>,
    pub preprocess: Preprocess,
    pub pager: Pager,
    pub scheduler: Scheduler,
    pub executor: Executor,
    pub telemetry: Telemetry,
    pub drain: Drain,
}

impl Config {
    /// The model that jobs without a served name fall back to: the one marked `default`, else the first.
    pub fn default_model(&self) -> Option<&Model> {
        self.models.iter().find(|model| model.default).or_else(|| self.models.first())
    }

    /// A served model.
    pub fn model(&self, name: &ModelName) -> Option<&Model> {
        self.models.iter().find(|model| model.name == *name)
    }
}

/// Which server to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NatsUrl {
    /// A suitable one on this machine, else a managed child.
    Auto,
    /// Always a managed child of this process.
    Managed,
    /// This one.
    Url(String),
}

/// `[nats]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nats {
    /// Which server.
    pub url: NatsUrl,
    /// `nats-server` binary for a managed server; `None`: found through PATH.
    pub server_path: Option<PathBuf>,
    /// Where a managed server stores streams.
    pub store_dir: PathBuf,
    /// Credentials file (`.creds`).
    pub credentials: Option<PathBuf>,
    /// First token of every subject.
    pub prefix: String,
    /// Longest wait for any answer of the server.
    pub request_timeout: Duration,
    /// Largest message of a managed server, headers included.
    pub max_payload_bytes: u64,
}

/// Where streams live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// On disk.
    File,
    /// In the server's memory: lost with it.
    Memory,
}

/// What to do about streams at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamMode {
    /// Create what is missing, check what exists.
    Create,
    /// Only check; something else (NACK, Terraform) owns them.
    Verify,
}

/// `[streams]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Streams {
    /// Create or only verify.
    pub mode: StreamMode,
    /// File or memory.
    pub storage: Storage,
    /// Copies of each stream in a cluster.
    pub replicas: usize,
    /// Most bytes of waiting jobs.
    pub jobs_max_bytes: u64,
    /// Most waiting jobs.
    pub jobs_max_messages: u64,
    /// Largest job document.
    pub job_max_bytes: u64,
    /// Most bytes of stored output.
    pub out_max_bytes: u64,
    /// How long output is kept.
    pub out_max_age: Duration,
    /// Most bytes of dead letters.
    pub dlq_max_bytes: u64,
    /// How long dead letters are kept.
    pub dlq_max_age: Duration,
    /// Most bytes in the media bucket.
    pub media_max_bytes: u64,
    /// How long media are kept.
    pub media_max_age: Duration,
    /// How long a cancellation is remembered.
    pub cancel_max_age: Duration,
    /// How long a job's id is remembered: a second publication inside is a duplicate.
    pub duplicate_window: Duration,
    /// Silence of a job's owner after which the job is delivered again.
    pub ack_wait: Duration,
    /// Deliveries after which a job counts as poison.
    pub max_attempts: u32,
    /// Most jobs of one class that are taken but have not ended, over all processes.
    pub max_ack_pending: u32,
}

/// One `[[models]]` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Name in job subjects.
    pub name: ModelName,
    /// Checkpoint folder, or Hugging Face repository id.
    pub path: String,
    /// Whether tools and `millrace up` take it when no model is named.
    pub default: bool,
}

/// How video frames stand in the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VideoPrompt {
    /// Each temporal patch between its own vision markers, with its timestamp (the checkpoints' training format).
    Nested,
    /// One pair of vision markers around all timestamps and frames.
    Plain,
}

/// What pages of patches hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchForm {
    /// What the model takes, normalised while resizing.
    Normalised,
    /// Resized samples of one byte; the device normalises them.
    Bytes,
}

/// Limits on media, checked before memory is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediaLimits {
    /// Most pixels of one image or frame.
    pub max_image_pixels: u64,
    /// Largest encoded image.
    pub max_image_bytes: u64,
    /// Largest encoded video.
    pub max_video_bytes: u64,
    /// Longest window of a video.
    pub max_video_secs: u64,
    /// Most frames of one video or frame list.
    pub max_frames: u32,
    /// Longest decode of one medium.
    pub decode_timeout: Duration,
}

/// `[preprocess]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preprocess {
    /// Jobs in preprocessing at once, interactive class.
    pub credits_interactive: usize,
    /// The same, batch class.
    pub credits_batch: usize,
    /// The same, stream class.
    pub credits_stream: usize,
    /// Threads that decode and resize; 0: three quarters of the cores.
    pub threads: usize,
    /// Folders that `file://` URLs may point into.
    pub file_roots: Vec<PathBuf>,
    /// ffmpeg binary.
    pub ffmpeg: PathBuf,
    /// ffprobe binary.
    pub ffprobe: PathBuf,
    /// Video prompt format.
    pub video_prompt: VideoPrompt,
    /// What pages hold.
    pub patches: PatchForm,
    /// Media limits.
    pub limits: MediaLimits,
}

impl Preprocess {
    /// Credits of one class.
    pub fn credits(&self, class: Class) -> usize {
        match class {
            Class::Interactive => self.credits_interactive,
            Class::Batch => self.credits_batch,
            Class::Stream => self.credits_stream,
        }
    }
}

/// `[pager]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pager {
    /// Most bytes of pages in memory.
    pub ram_bytes: u64,
    /// Most bytes of pages on disk.
    pub disk_bytes: u64,
    /// Folder of spilled pages.
    pub dir: PathBuf,
    /// A job's pages are freed when nobody renewed them for this long.
    pub lease: Duration,
}

/// `[scheduler]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduler {
    /// Most tokens of one step.
    pub step_tokens: u32,
    /// Most sequences of one step.
    pub max_sequences: u32,
    /// Plans sent ahead of the outputs.
    pub run_ahead: u32,
    /// Jobs accepted beyond those that run.
    pub waiting: u32,
    /// Most tokens of a job that names no number.
    pub default_max_tokens: u32,
    /// Free blocks kept back when a job is admitted, so that running ones can grow.
    pub watermark_blocks: u32,
    /// Whether equal prompt prefixes share blocks.
    pub prefix_cache: bool,
    /// Waiting time that raises a job by one priority; zero: never.
    pub ageing: Duration,
    /// Shares of tenants whose share is not 1.
    pub tenant_weights: BTreeMap<String, u32>,
    /// Longest wait for the output of a step whose plan the executor has confirmed.
    pub step_timeout: Duration,
    /// Least time between two chunks of a job outside the interactive class.
    pub coalesce: Duration,
}

/// Device to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device that works, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA device of this ordinal.
    Cuda(usize),
}

impl DeviceChoice {
    /// The device that `text` names: `auto`, `cpu`, `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// A sentence that lists them.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("must be \"auto\", \"cpu\", \"cuda\" or \"cuda:N\", not \"{text}\"")),
        }
    }
}

/// Element type of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// bf16 on CUDA, f32 on the CPU.
    Auto,
    /// bfloat16.
    Bf16,
    /// float32.
    F32,
}

/// `[executor]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executor {
    /// Device.
    pub device: DeviceChoice,
    /// Element type.
    pub dtype: Dtype,
    /// Bytes of the KV pool; `None`: as the device has room.
    pub kv_bytes: Option<u64>,
    /// Tokens of one KV block.
    pub block_tokens: u32,
    /// Sequences held at once.
    pub slots: u32,
    /// Most tokens of one step.
    pub step_tokens: u32,
    /// Most vision patches of one step.
    pub step_patches: u32,
    /// Host memory for KV blocks that left the pool; 0: none.
    pub swap_bytes: u64,
    /// Host memory for vision features that left the device; 0: none.
    pub encoder_host_bytes: u64,
    /// CPU threads; 0: one per core.
    pub threads: usize,
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `[telemetry]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Telemetry {
    /// Address of /metrics and the health pages; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Log form.
    pub log_format: LogFormat,
    /// Log filter in `tracing`'s syntax.
    pub log_filter: String,
}

/// `[drain]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drain {
    /// Longest wait for running work after SIGTERM.
    pub timeout: Duration,
}
