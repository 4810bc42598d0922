//! A loaded model folder, and the two stages of preprocessing a job: [`Preparer::gather`] waits (objects, files,
//! ffmpeg), [`Preparer::build`] computes (image decoding, resizing, template, tokens) and belongs on a blocking thread.

use std::path::Path;

use bytes::Bytes;
use millrace_protocol::content::RawSize;
use millrace_protocol::ready::Normalise;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ErrorCode, JobError, JobRequest, PageDtype, Part, Source};

use crate::chat_template::ChatTemplate;
use crate::error::LoadError;
use crate::expand::VisionTexts;
use crate::frames::{FrameWriter, VideoPatches};
use crate::generation_config::{GenerationConfig, check as check_sampling};
use crate::limits::PrepareLimits;
use crate::model_files::{ModelFacts, VisionTokens};
use crate::processor_config::ProcessorConfig;
use crate::request_rules::{check, media_parts};
pub use crate::source::MediaFetch;
use crate::source::{Found, Located, find};
use crate::tokenizer::Tokenizer;
use crate::video_decode::{Window, decode_video};

/// What a model that sees needs beside the text.
pub(crate) struct Vision {
    pub(crate) processor: ProcessorConfig,
    pub(crate) tokens: VisionTokens,
    pub(crate) texts: VisionTexts,
}

/// Preprocesses jobs of one model. Share it in an `Arc`.
pub struct Preparer {
    pub(crate) facts: ModelFacts,
    pub(crate) generation: GenerationConfig,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) vision: Option<Vision>,
    pub(crate) limits: PrepareLimits,
    pub(crate) dtype: PageDtype,
}

/// An encoded or raw image, not yet decoded.
pub(crate) struct EncodedImage {
    pub(crate) bytes: Bytes,
    pub(crate) media_type: Option<String>,
    pub(crate) raw: Option<RawSize>,
}

pub(crate) enum GatheredMedia {
    Image(EncodedImage),
    Frames { frames: Vec<EncodedImage>, fps: f64, indices: Option<Vec<u32>> },
    Video(VideoPatches),
}

/// Everything a job needs from elsewhere; the input of [`Preparer::build`].
pub struct Gathered {
    pub(crate) media: Vec<GatheredMedia>,
}

/// One image, or one temporal group of a video. Becomes a page and a [`millrace_protocol::ready::MediaItem`].
#[derive(Clone, PartialEq)]
pub struct PreparedMedia {
    /// Index in the prompt of the first placeholder.
    pub start: u32,
    /// Placeholder tokens.
    pub tokens: u32,
    /// Patches down.
    pub grid_h: u32,
    /// Patches across.
    pub grid_w: u32,
    /// Element type of `patches`.
    pub dtype: PageDtype,
    /// Shape of `patches`: `[grid_h * grid_w, 3, slots, patch, patch]`; 1 slot for stills.
    pub shape: [u32; 5],
    /// Patches, little endian; normalised unless they are bytes.
    pub patches: Bytes,
    /// What normalises bytes.
    pub normalise: Option<Normalise>,
}

/// A job in the model's terms.
#[derive(Clone, PartialEq)]
pub struct Prepared {
    /// Prompt with placeholders expanded.
    pub prompt: Vec<u32>,
    /// Media in prompt order.
    pub media: Vec<PreparedMedia>,
    /// How tokens are drawn.
    pub sampling: ResolvedSampling,
    /// Most tokens to generate; prompt and answer fit the model together.
    pub max_tokens: u32,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the answer: the checkpoint's, unless ignored, and the job's.
    pub stop_token_ids: Vec<u32>,
    /// 0 to 9.
    pub priority: u8,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let patch_bytes: usize = self.media.iter().map(|item| item.patches.len()).sum();
        f.debug_struct("Prepared")
            .field("prompt_tokens", &self.prompt.len())
            .field("media", &self.media.len())
            .field("patch_bytes", &patch_bytes)
            .field("max_tokens", &self.max_tokens)
            .finish_non_exhaustive()
    }
}

impl Preparer {
    /// Loads a checkpoint folder's configuration, tokenizer and template. No weights are read.
    ///
    /// # Errors
    /// [`LoadError`] naming the file that is missing, malformed or unsupported.
    pub fn load(folder: &Path, limits: PrepareLimits) -> Result<Self, LoadError> {
        let facts = ModelFacts::load(folder)?;
        let generation = GenerationConfig::load(folder, &facts)?;
        let tokenizer = Tokenizer::load(folder)?;
        let template = ChatTemplate::load(folder)?;
        let vision = match facts.vision {
            None => None,
            Some(tokens) => {
                let text = |id: u32| {
                    let missing = || {
                        LoadError::content(
                            folder.join("tokenizer.json"),
                            format!("no token {id}, which config.json names"),
                        )
                    };
                    tokenizer.token(id).ok_or_else(missing)
                };
                let texts =
                    VisionTexts { video: text(tokens.video)?, start: text(tokens.start)?, end: text(tokens.end)? };
                text(tokens.image)?;
                Some(Vision { processor: ProcessorConfig::load(folder, &facts)?, tokens, texts })
            }
        };
        let dtype = limits.dtype.unwrap_or(facts.dtype);
        Ok(Self { facts, generation, tokenizer, template, vision, limits, dtype })
    }

    /// What config.json says.
    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// The tokenizer, for whoever needs it beside the prompt.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Checks the document, fetches its media and decodes its video files. Dropping the future ends its children.
    ///
    /// # Errors
    /// The job's fault, as its publisher will read it.
    pub async fn gather<F: MediaFetch>(&self, request: &JobRequest, fetch: &F) -> Result<Gathered, JobError> {
        check(request, &self.facts, &self.limits)?;
        check_sampling(&request.sampling, self.facts.vocab)?;
        let mut media = Vec::new();
        let mut patch_bytes = 0u64;
        for part in media_parts(request) {
            media.push(match part {
                Part::Text { .. } => continue,
                Part::Image { source } => GatheredMedia::Image(self.image(source, fetch).await?),
                Part::Frames { frames, fps, indices } => {
                    let mut found = Vec::with_capacity(frames.len());
                    for source in frames {
                        found.push(self.image(source, fetch).await?);
                    }
                    GatheredMedia::Frames { frames: found, fps: *fps, indices: indices.clone() }
                }
                Part::Video { source, start_secs, end_secs, fps } => {
                    let window = Window { start_secs: *start_secs, end_secs: *end_secs, fps: *fps };
                    let video = self.video(source, window, fetch, patch_bytes).await?;
                    patch_bytes += video.groups.iter().map(|group| group.len() as u64).sum::<u64>();
                    GatheredMedia::Video(video)
                }
            });
        }
        Ok(Gathered { media })
    }

    async fn image<F: MediaFetch>(&self, source: &Source, fetch: &F) -> Result<EncodedImage, JobError> {
        // Raw pixels are as long as their size says, which is checked against the pixel limit later.
        let most =
            if source.raw.is_some() { self.limits.image_pixels.saturating_mul(3) } else { self.limits.image_bytes };
        let found = find(source, fetch, &self.limits.file_roots, most).await?;
        Ok(EncodedImage { bytes: found.at.into_bytes().await?, media_type: found.media_type, raw: source.raw })
    }

    async fn video<F: MediaFetch>(
        &self,
        source: &Source,
        window: Window,
        fetch: &F,
        used: u64,
    ) -> Result<VideoPatches, JobError> {
        window.check()?;
        let Some(vision) = &self.vision else { return Err(blind()) };
        if source.raw.is_some() {
            let text = "raw pixels go in a part of type `frames` or `image`, not `video`";
            return Err(JobError::new(ErrorCode::MediaType, text));
        }
        let Found { at, media_type } = find(source, fetch, &self.limits.file_roots, self.limits.video_bytes).await?;
        check_media_type(media_type.as_deref())?;
        let settings = &vision.processor.video;
        let left = self.limits.patch_bytes.saturating_sub(used);
        let writer = |size, count| FrameWriter::new(size, count, settings, self.dtype, left);
        match at {
            Located::File(path) => decode_video(&path, window, settings, writer, &self.limits).await,
            Located::Bytes(bytes) => {
                let failed = |error: std::io::Error| {
                    let text = format!(
                        "the video cannot be stored for decoding: {error}; this is the service's fault, try again later"
                    );
                    JobError::new(ErrorCode::Overloaded, text)
                };
                let file = tempfile::Builder::new()
                    .prefix("millrace-video-")
                    .tempfile_in(&self.limits.temp_folder)
                    .map_err(failed)?;
                tokio::fs::write(file.path(), &bytes).await.map_err(failed)?;
                decode_video(file.path(), window, settings, writer, &self.limits).await
            }
        }
    }
}

/// A media type that cannot be a video is a mistake worth telling; which video it is, the bytes say.
fn check_media_type(media_type: Option<&str>) -> Result<(), JobError> {
    match media_type {
        Some(given)
            if !["video/", "image/gif", "application/"]
                .iter()
                .any(|known| given.to_ascii_lowercase().starts_with(known)) =>
        {
            let text = format!(
                "`media_type` of a video is {given:?}: send video/mp4, video/webm, video/x-matroska or image/gif"
            );
            Err(JobError::new(ErrorCode::MediaType, text))
        }
        _ => Ok(()),
    }
}

pub(crate) fn blind() -> JobError {
    JobError::new(ErrorCode::MediaType, "this model reads text only: remove the media, or use a model that sees")
}
