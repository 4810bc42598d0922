//! The requests of a case: random token ids, and pictures that no cache has seen. The same seed gives the same requests.

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, RgbImage};
use millrace_protocol::content::{Content, Message, Part, RawSize, Source};
use millrace_protocol::{JobRequest, Sampling};

use super::case::{Case, Media};

/// Frames of a clip in each second, as video processors sample.
const CLIP_FPS: f64 = 2.0;
/// Quality of the JPEG frames: what cameras and browsers send.
const JPEG_QUALITY: u8 = 90;
/// Side in pixels of the picture's even patches.
const TILE: u32 = 16;

/// A stream of numbers by SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// Starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which must not be 0.
    pub fn below(&mut self, end: u32) -> u32 {
        // The high half of a product of 32 bits is below `end`.
        u32::try_from((u64::from(end) * (self.next_bits() >> 32)) >> 32).unwrap_or(0)
    }
}

/// How a picture travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Picture {
    /// Encoded, inside the job.
    Jpeg(Vec<u8>),
    /// Raw RGB, stored beforehand and named in the job.
    Raw {
        /// The pixels.
        pixels: Vec<u8>,
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
    },
}

/// A request before its pictures are stored.
#[derive(Debug, Clone)]
pub struct Draft {
    case: Case,
    ids: Vec<u32>,
    /// The pictures in order.
    pub pictures: Vec<Picture>,
}

/// Draws one request of `case`. Token ids avoid both ends of the vocabulary, where special tokens stand.
pub fn draft(case: &Case, numbers: &mut Numbers, vocabulary: u32, raw: bool) -> anyhow::Result<Draft> {
    let (low, high) = (vocabulary / 100, vocabulary / 100 * 92);
    let count = if case.media == Media::None { case.input } else { 0 };
    let ids = (0..count).map(|_| low + numbers.below(high.saturating_sub(low).max(1))).collect();
    let (count, width, height) = match case.media {
        Media::None => (0, 0, 0),
        Media::Image { width, height } => (1, width, height),
        Media::Clip { frames, width, height } => (frames, width, height),
    };
    let pictures = (0..count).map(|_| picture(numbers, width, height, raw)).collect::<anyhow::Result<_>>()?;
    Ok(Draft { case: *case, ids, pictures })
}

impl Draft {
    /// The job; `stored` are the names of raw pictures in the media bucket.
    pub fn request(&self, stored: &[String]) -> JobRequest {
        let mut names = stored.iter();
        let sources = self.pictures.iter().map(|picture| match picture {
            Picture::Jpeg(bytes) => Source {
                data: Some(STANDARD.encode(bytes)),
                media_type: Some("image/jpeg".into()),
                ..Source::default()
            },
            Picture::Raw { width, height, .. } => Source {
                object: names.next().cloned(),
                raw: Some(RawSize { width: *width, height: *height }),
                ..Source::default()
            },
        });
        let part = match self.case.media {
            Media::None => None,
            Media::Image { .. } => sources.map(|source| Part::Image { source }).next(),
            Media::Clip { .. } => Some(Part::Frames { frames: sources.collect(), fps: CLIP_FPS, indices: None }),
        };
        let mut request = JobRequest {
            sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
            max_tokens: Some(self.case.output),
            ignore_eos: true,
            ..JobRequest::default()
        };
        match part {
            None => request.prompt_token_ids = Some(self.ids.clone()),
            Some(media) => {
                let content = Content::Parts(vec![media, Part::Text { text: "Describe.".into() }]);
                request.messages = Some(vec![Message { role: "user".into(), content, extra: serde_json::Map::new() }]);
            }
        }
        request
    }
}

/// Even tiles of random colours with a little noise: as much detail as a photograph, where pure noise would measure the
/// JPEG decoder's worst case.
fn picture(numbers: &mut Numbers, width: u32, height: u32, raw: bool) -> anyhow::Result<Picture> {
    let across = width.div_ceil(TILE);
    let tiles: Vec<u64> = (0..across * height.div_ceil(TILE)).map(|_| numbers.next_bits()).collect();
    let image = RgbImage::from_fn(width, height, |x, y| {
        let tile = tiles[(y / TILE * across + x / TILE) as usize].to_le_bytes();
        let noise = (numbers.next_bits() & 7) as u8;
        image::Rgb([tile[0] / 2 + noise, tile[1] / 2 + noise, tile[2] / 2 + noise])
    });
    if raw {
        return Ok(Picture::Raw { pixels: image.into_raw(), width, height });
    }
    let mut bytes = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).encode(&image, width, height, ExtendedColorType::Rgb8)?;
    Ok(Picture::Jpeg(bytes.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_differ_repeat_by_seed_and_stay_inside_the_vocabulary() {
        let case = Case::text(1, 500, 7);
        let ids = |seed| draft(&case, &mut Numbers::new(seed), 1024, false).unwrap().ids;
        assert_eq!(ids(1), ids(1));
        assert_ne!(ids(1), ids(2));
        assert!(ids(3).iter().all(|id| (10..920).contains(id)));
        let job = draft(&case, &mut Numbers::new(1), 1024, false).unwrap().request(&[]);
        assert_eq!((job.max_tokens, job.ignore_eos, job.prompt_token_ids.unwrap().len()), (Some(7), true, 500));
    }

    #[test]
    fn a_clip_is_frames_inside_the_job_or_named_beside_it() {
        let case = Case { requests: 1, input: 0, output: 4, media: Media::Clip { frames: 3, width: 40, height: 24 } };
        let frames = |raw: bool| {
            let draft = draft(&case, &mut Numbers::new(5), 1024, raw).unwrap();
            let names: Vec<String> = (0..3).map(|n| format!("bench-{n}")).collect();
            let Content::Parts(parts) = draft.request(&names).messages.unwrap().remove(0).content else {
                panic!("no parts")
            };
            let Part::Frames { frames, .. } = parts[0].clone() else { panic!("no frames") };
            frames
        };
        let jpegs = frames(false);
        let bytes = STANDARD.decode(jpegs[2].data.as_ref().unwrap()).unwrap();
        let image = image::load_from_memory(&bytes).unwrap();
        assert_eq!((image.width(), image.height()), (40, 24));
        let raw = frames(true);
        assert_eq!(raw[1].object.as_deref(), Some("bench-1"));
        assert_eq!(raw[1].raw, Some(RawSize { width: 40, height: 24 }));
    }
}
