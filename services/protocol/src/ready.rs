//! Preprocess to scheduler: a job in the model's terms, offered for taking over.

use serde::{Deserialize, Serialize};

use crate::ids::{ActorId, JobId, ModelName};
use crate::job::Class;
use crate::pages::PageRef;
use crate::sampling::ResolvedSampling;

/// One image, or one temporal group of video frames, that stands in the prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MediaItem {
    /// Index in the prompt of the item's first placeholder token.
    pub start: u32,
    /// Placeholder tokens: `grid_h * grid_w / merge²` for each temporal patch.
    pub tokens: u32,
    /// Patches down, before merging.
    pub grid_h: u32,
    /// Patches across, before merging.
    pub grid_w: u32,
    /// Patches in the reference's patch order, shape `[grid_h*grid_w, 3, slots, p, p]`: `slots` is the temporal
    /// patch size, or 1 for a still whose slots would be equal. Normalised, or samples of one byte each.
    pub patches: PageRef,
    /// What normalises the samples; present exactly where the page is [`crate::PageDtype::U8`].
    pub normalise: Option<Normalise>,
}

/// From a sample `x` of one byte to what the model takes: `(x - 255 mean) / (255 std)`, each operation rounded to f32.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Normalise {
    /// Mean of red, green and blue, of samples in 0..=1.
    pub mean: [f32; 3],
    /// Their standard deviation.
    pub std: [f32; 3],
}

impl Normalise {
    /// Equal exactly where the normalised patches are: a key.
    pub fn bits(&self) -> [u32; 6] {
        let ([a, b, c], [d, e, f]) = (self.mean, self.std);
        [a, b, c, d, e, f].map(f32::to_bits)
    }
}

/// A preprocessed job. `Debug` prints sizes only.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadyJob {
    /// Identity.
    pub job: JobId,
    /// Model it runs on.
    pub model: ModelName,
    /// Service class.
    pub class: Class,
    /// Prompt with placeholders expanded.
    pub prompt: Vec<u32>,
    /// Media in prompt order.
    pub media: Vec<MediaItem>,
    /// How tokens are drawn.
    pub sampling: ResolvedSampling,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the answer (the checkpoint's and the job's), empty if all are ignored.
    pub stop_token_ids: Vec<u32>,
    /// 0 to 9.
    pub priority: u8,
    /// Latest useful moment, milliseconds since 1970.
    pub deadline_unix_ms: Option<u64>,
    /// One chunk per step, or only the final one.
    pub stream: bool,
    /// Whose share it uses.
    pub tenant: String,
    /// The publisher's metadata, as JSON text.
    pub metadata_json: Option<String>,
    /// What preprocessing took, in milliseconds.
    pub preprocess_ms: f64,
}

impl std::fmt::Debug for ReadyJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadyJob")
            .field("job", &self.job)
            .field("model", &self.model)
            .field("prompt_tokens", &self.prompt.len())
            .field("media", &self.media.len())
            .field("max_tokens", &self.max_tokens)
            .field("priority", &self.priority)
            .finish_non_exhaustive()
    }
}

/// The work-queue message behind a job: who answers for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// Subject that acknowledges, extends or returns the work-queue message.
    pub ack_subject: String,
    /// The message's sequence in the work queue.
    pub job_seq: u64,
    /// 1 for the first delivery.
    pub attempt: u32,
}

/// What earlier owners have already shown.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Shown {
    /// Sequence of the last message on the output subject, 0 if there is none: the fence.
    pub last_seq: u64,
    /// Answer tokens already shown.
    pub token_ids: Vec<u32>,
    /// Answer text already shown.
    pub text: String,
}

/// Hand-off of one job (postcard). Accepting it takes over the delivery's heartbeat and the final ack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The job.
    pub ready: ReadyJob,
    /// Its work-queue message.
    pub delivery: Delivery,
    /// What was already shown.
    pub shown: Shown,
    /// Preprocess instance that offers it and holds its pages.
    pub from: ActorId,
}

/// Answer to an [`Offer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum OfferReply {
    /// The scheduler answers for the job now, and stores its claim before it shows anything. Offering the same delivery
    /// again gives the same answer, so an offer whose answer was lost can be repeated, to this scheduler or to another:
    /// of two that claim, the fence refuses the later one, which lets go.
    Accepted,
    /// No room; the offerer keeps the job.
    Busy,
    /// The job ended or belongs to another owner (the claim was refused). The offerer lets go of it without acknowledging.
    Settled,
}
