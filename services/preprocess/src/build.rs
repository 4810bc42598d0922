//! Second stage: decode and patchify images and frame lists, render and tokenise the prompt, place the media in it.

use std::borrow::Cow;

use millrace_protocol::ready::Normalise;
use millrace_protocol::{ErrorCode, JobError, JobId, JobRequest, PageDtype};

use crate::chat_template::TemplateInput;
use crate::conversation::{Form, messages};
use crate::expand::{Expanded, expand_ids, expand_videos};
use crate::frames::{FrameWriter, VideoPatches};
use crate::image_decode::{decode_image, take_raw};
use crate::patchify::{PatchLayout, Patchifier, Rgb};
use crate::prepare::{EncodedImage, Gathered, GatheredMedia, Prepared, PreparedMedia, Preparer, Vision, blind};
use crate::processor_config::Pixels;
use crate::request_rules::{DEFAULT_PRIORITY, check, max_tokens};
use crate::smart_resize::image_size;
use crate::video_sampling::timestamp_texts;

/// A still as the model takes it.
struct Still {
    grid: (u32, u32),
    patches: Vec<u8>,
}

/// A job's media, each kind in order.
#[derive(Default)]
struct Media {
    stills: Vec<Still>,
    videos: Vec<VideoPatches>,
}

impl Preparer {
    /// Turns a gathered job into what the model takes. Computes for as long as decoding and resizing take.
    /// `now_unix_ms` is for templates that print the date.
    ///
    /// # Errors
    /// The job's fault, as its publisher will read it.
    pub fn build(
        &self,
        request: &JobRequest,
        job: &JobId,
        gathered: Gathered,
        now_unix_ms: u64,
    ) -> Result<Prepared, JobError> {
        check(request, &self.facts, &self.limits)?;
        let media = self.media(gathered)?;
        let expanded = self.prompt(request, &media, now_unix_ms)?;
        let max_tokens =
            max_tokens(request, self.generation.max_new_tokens, expanded.ids.len(), &self.facts, &self.limits)?;
        let mut stop_token_ids = if request.ignore_eos { Vec::new() } else { self.generation.eos.clone() };
        stop_token_ids.extend(&request.stop_token_ids);
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        Ok(Prepared {
            sampling: self.generation.resolve(&request.sampling, job, self.facts.vocab)?,
            media: self.place(media, &expanded),
            prompt: expanded.ids,
            max_tokens,
            stop: request.stop.clone(),
            stop_token_ids,
            priority: request.priority.unwrap_or(DEFAULT_PRIORITY),
        })
    }

    fn media(&self, gathered: Gathered) -> Result<Media, JobError> {
        let mut media = Media::default();
        let mut left = self.limits.patch_bytes;
        for item in gathered.media {
            let Some(vision) = &self.vision else { return Err(blind()) };
            let used = match item {
                GatheredMedia::Image(image) => {
                    let still = self.still(&image, &vision.processor.image, left)?;
                    media.stills.push(still);
                    media.stills.last().map_or(0, |still| still.patches.len())
                }
                GatheredMedia::Frames { frames, fps, indices } => {
                    let indices = indices.unwrap_or_else(|| (0..frames.len() as u32).collect());
                    let video = self.frames(&frames, &indices, fps, vision, left)?;
                    let bytes = video.groups.iter().map(Vec::len).sum();
                    media.videos.push(video);
                    bytes
                }
                GatheredMedia::Video(video) => {
                    let bytes = video.groups.iter().map(Vec::len).sum();
                    media.videos.push(video);
                    bytes
                }
            };
            left = left.checked_sub(used as u64).ok_or_else(|| too_many_patches(self.limits.patch_bytes))?;
        }
        Ok(media)
    }

    fn still(&self, image: &EncodedImage, pixels: &Pixels, left: u64) -> Result<Still, JobError> {
        let rgb = self.decode(image)?;
        let target = image_size(rgb.height, rgb.width, pixels.bounds)?;
        let layout = PatchLayout { patch: pixels.patch as usize, merge: pixels.merge as usize, slots: 1 };
        if (layout.elements(target.0, target.1) * self.dtype.size_bytes()) as u64 > left {
            return Err(too_many_patches(self.limits.patch_bytes));
        }
        let patchifier = Patchifier::new((rgb.height, rgb.width), target, layout, pixels.mean, pixels.std, self.dtype);
        let mut patches = vec![0; patchifier.output_bytes()];
        if !patchifier.write(&rgb.pixels, 0, &mut patches) {
            return Err(JobError::new(
                ErrorCode::Internal,
                "an image does not have the size it was decoded to; report it with the job",
            ));
        }
        Ok(Still { grid: patchifier.grid(), patches })
    }

    fn decode(&self, image: &EncodedImage) -> Result<Rgb, JobError> {
        match image.raw {
            Some(size) => take_raw(&image.bytes, size, &self.limits),
            None => decode_image(&image.bytes, image.media_type.as_deref(), &self.limits),
        }
    }

    /// Frames as they are, no sampling: frame `i` of the source shows at `i / fps` seconds.
    fn frames(
        &self,
        frames: &[EncodedImage],
        indices: &[u32],
        fps: f64,
        vision: &Vision,
        left: u64,
    ) -> Result<VideoPatches, JobError> {
        let settings = &vision.processor.video;
        let count = frames.len() as u32;
        let Some(first) = frames.first() else {
            return Err(JobError::new(ErrorCode::InvalidValue, "a frame list is empty: send at least two frames"));
        };
        let first = self.decode(first)?;
        let size = (first.height, first.width);
        let mut writer = FrameWriter::new(size, count, settings, self.dtype, left)?;
        writer.write_all(|index| {
            let rgb = match frames.get(index).filter(|_| index > 0) {
                None => Cow::Borrowed(&first),
                Some(frame) => Cow::Owned(self.decode(frame)?),
            };
            if (rgb.height, rgb.width) != size {
                let text = format!(
                    "frame {index} has {} x {} pixels and frame 0 {} x {}: send frames of one size",
                    rgb.width, rgb.height, size.1, size.0
                );
                return Err(JobError::new(ErrorCode::InvalidValue, text));
            }
            Ok(rgb)
        })?;
        writer.finish(timestamp_texts(indices, fps, settings.pixels.temporal as usize))
    }

    fn prompt(&self, request: &JobRequest, media: &Media, now_unix_ms: u64) -> Result<Expanded, JobError> {
        let ids = match (&request.messages, &request.prompt, &request.prompt_token_ids) {
            (Some(conversation), _, _) => {
                let Some(template) = &self.template else {
                    let text = "this model has no chat template: send `prompt` instead of `messages`";
                    return Err(JobError::new(ErrorCode::Template, text));
                };
                let form = Form { parts: self.vision.is_some(), text_arguments: template.takes_text_arguments() };
                let text = template.render(TemplateInput {
                    messages: &messages(conversation, form),
                    tools: request.tools.as_ref().filter(|tools| !tools.is_null()),
                    args: &request.template_args,
                    now_unix_ms,
                })?;
                self.tokenizer.encode(&self.with_times(text, media)?)?
            }
            (None, Some(text), _) => self.tokenizer.encode_plain(text)?,
            (None, None, Some(ids)) => ids.clone(),
            (None, None, None) => Vec::new(),
        };
        let Some(vision) = &self.vision else {
            return Ok(Expanded { ids, image_starts: Vec::new(), group_starts: Vec::new() });
        };
        let images: Vec<u32> = media.stills.iter().map(|still| tokens(still.grid, &vision.processor.image)).collect();
        let of_video = |video: &VideoPatches| {
            let each = tokens((video.grid_h, video.grid_w), &vision.processor.video.pixels);
            std::iter::repeat_n(each, video.groups.len())
        };
        let groups: Vec<u32> = media.videos.iter().flat_map(of_video).collect();
        self.check_length(ids.len(), &images, &groups)?;
        expand_ids(&ids, vision.tokens, &images, &groups)
    }

    fn with_times(&self, text: String, media: &Media) -> Result<String, JobError> {
        let Some(vision) = &self.vision else { return Ok(text) };
        let times: Vec<&[String]> = media.videos.iter().map(|video| video.times.as_slice()).collect();
        expand_videos(&text, &vision.texts, &times, self.limits.nested_video)
    }

    /// Refuses what cannot fit before it is spelled out.
    fn check_length(&self, ids: usize, images: &[u32], groups: &[u32]) -> Result<(), JobError> {
        let media: u64 = images.iter().chain(groups).map(|&tokens| u64::from(tokens)).sum();
        let total = ids as u64 + media;
        if total > u64::from(self.facts.max_tokens) + (images.len() + groups.len()) as u64 {
            let text = format!(
                "the prompt has about {total} tokens, {media} of them of media, but the model holds {}: send fewer or smaller media",
                self.facts.max_tokens
            );
            return Err(JobError::new(ErrorCode::ContextLength, text));
        }
        Ok(())
    }

    fn place(&self, media: Media, expanded: &Expanded) -> Vec<PreparedMedia> {
        let Some(vision) = &self.vision else { return Vec::new() };
        let dtype = self.dtype;
        let item = |start: u32, grid: (u32, u32), slots: u32, pixels: &Pixels, patches: Vec<u8>| PreparedMedia {
            start,
            tokens: tokens(grid, pixels),
            grid_h: grid.0,
            grid_w: grid.1,
            dtype,
            shape: [grid.0 * grid.1, 3, slots, pixels.patch, pixels.patch],
            patches: patches.into(),
            normalise: (dtype == PageDtype::U8).then_some(Normalise { mean: pixels.mean, std: pixels.std }),
        };
        let (image, video) = (&vision.processor.image, &vision.processor.video.pixels);
        let stills = media.stills.into_iter().zip(&expanded.image_starts);
        let mut placed: Vec<PreparedMedia> =
            stills.map(|(still, &start)| item(start, still.grid, 1, image, still.patches)).collect();
        let groups = media.videos.into_iter().flat_map(|video| {
            let grid = (video.grid_h, video.grid_w);
            video.groups.into_iter().map(move |patches| (grid, patches))
        });
        let groups = groups.zip(&expanded.group_starts);
        placed.extend(groups.map(|((grid, patches), &start)| item(start, grid, video.temporal, video, patches)));
        placed.sort_by_key(|item| item.start);
        placed
    }
}

/// Tokens of one frame group or still.
fn tokens(grid: (u32, u32), pixels: &Pixels) -> u32 {
    grid.0 * grid.1 / (pixels.merge * pixels.merge)
}

fn too_many_patches(limit: u64) -> JobError {
    let text = format!("the job's media become more than {limit} bytes of patches: send fewer or smaller ones");
    JobError::new(ErrorCode::TooLarge, text)
}
