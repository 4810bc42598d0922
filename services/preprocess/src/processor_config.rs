//! preprocessor_config.json and video_preprocessor_config.json of a checkpoint, with the defaults of the
//! reference's classes where they are silent. Refuses settings that would make the pixels differ from the reference.

use std::path::Path;

use serde::Deserialize;

use crate::error::LoadError;
use crate::model_files::{ModelFacts, read_json, read_json_if_present};
use crate::smart_resize::SizeBounds;

/// Settings both files share.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// Side of a patch, in pixels.
    pub patch: u32,
    /// Patches merged into one token, along each side.
    pub merge: u32,
    /// Frames in a patch.
    pub temporal: u32,
    /// Mean per channel, of samples in 0..=1.
    pub mean: [f32; 3],
    /// Standard deviation per channel.
    pub std: [f32; 3],
    /// Bounds of the resized area.
    pub bounds: SizeBounds,
}

/// Settings of the video processor.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoSettings {
    /// Shared settings.
    pub pixels: Pixels,
    /// Frames sampled per second of video.
    pub fps: f64,
    /// Least number of sampled frames, if the video has as many.
    pub min_frames: u32,
    /// Greatest number of sampled frames.
    pub max_frames: u32,
    /// Tokens to which each frame is limited; `None` if only the whole video is bounded.
    pub frame_cap_tokens: Option<u32>,
}

impl VideoSettings {
    /// Bounds of the area of `frames` frames together.
    pub fn bounds(&self, frames: u32) -> SizeBounds {
        let mut bounds = self.pixels.bounds;
        if let (Some(tokens), 1..) = (self.frame_cap_tokens, frames) {
            let cap = u64::from(tokens) * u64::from(bounds.factor).pow(2);
            let floor = (bounds.min_pixels as f64 * 1.05) as u64;
            bounds.max_pixels = cap.min(bounds.max_pixels / u64::from(frames)).max(floor) * u64::from(frames);
        }
        bounds
    }
}

/// Both processors of a checkpoint that sees.
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessorConfig {
    /// Stills.
    pub image: Pixels,
    /// Videos.
    pub video: VideoSettings,
}

#[derive(Deserialize, Default)]
struct Size {
    shortest_edge: Option<u64>,
    longest_edge: Option<u64>,
}

#[derive(Deserialize, Default)]
struct Raw {
    size: Option<Size>,
    min_pixels: Option<u64>,
    max_pixels: Option<u64>,
    patch_size: Option<u32>,
    merge_size: Option<u32>,
    temporal_patch_size: Option<u32>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    resample: Option<u32>,
    do_resize: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
    rescale_factor: Option<f64>,
    fps: Option<f64>,
    min_frames: Option<u32>,
    max_frames: Option<u32>,
    cap_pixels_per_frame: Option<bool>,
    max_video_tokens: Option<u32>,
}

/// Defaults of a reference class.
struct Defaults {
    min_pixels: u64,
    max_pixels: u64,
    patch: u32,
    mean: [f32; 3],
    std: [f32; 3],
}

/// `Qwen2VLImageProcessor`.
const IMAGE: Defaults = Defaults {
    min_pixels: 56 * 56,
    max_pixels: 28 * 28 * 1280,
    patch: 14,
    mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
    std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
};

/// `Qwen3VLVideoProcessor`.
const VIDEO: Defaults =
    Defaults { min_pixels: 128 * 32 * 32, max_pixels: 32 * 32 * 768, patch: 16, mean: [0.5; 3], std: [0.5; 3] };

/// Number that Pillow and the reference give to bicubic resampling.
const BICUBIC: u32 = 3;

impl Raw {
    fn pixels(&self, defaults: &Defaults, path: &Path) -> Result<Pixels, LoadError> {
        let switched_off =
            [("do_resize", self.do_resize), ("do_rescale", self.do_rescale), ("do_normalize", self.do_normalize)];
        if let Some((key, _)) = switched_off.iter().find(|(_, value)| *value == Some(false)) {
            return Err(LoadError::unsupported(path, format!("`{key}` is false")));
        }
        if self.resample.is_some_and(|number| number != BICUBIC) {
            return Err(LoadError::unsupported(path, "`resample` is not 3 (bicubic)"));
        }
        if self.rescale_factor.is_some_and(|factor| (factor * 255.0 - 1.0).abs() > 1e-9) {
            return Err(LoadError::unsupported(path, "`rescale_factor` is not 1/255"));
        }
        let patch = self.patch_size.unwrap_or(defaults.patch);
        let (merge, temporal) = (self.merge_size.unwrap_or(2), self.temporal_patch_size.unwrap_or(2));
        if ![patch, merge, temporal].iter().all(|size| (1..=64).contains(size)) {
            return Err(LoadError::content(path, "patch_size, merge_size and temporal_patch_size must be 1 to 64"));
        }
        let size = self.size.as_ref();
        let min_pixels = self.min_pixels.or(size.and_then(|s| s.shortest_edge)).unwrap_or(defaults.min_pixels);
        let max_pixels = self.max_pixels.or(size.and_then(|s| s.longest_edge)).unwrap_or(defaults.max_pixels);
        Ok(Pixels {
            patch,
            merge,
            temporal,
            mean: self.image_mean.unwrap_or(defaults.mean),
            std: self.image_std.unwrap_or(defaults.std),
            bounds: SizeBounds { factor: patch * merge, min_pixels, max_pixels },
        })
    }
}

impl ProcessorConfig {
    /// Reads both files of a checkpoint folder. A missing video file leaves the video class's defaults.
    ///
    /// # Errors
    /// [`LoadError`] if a file is missing, malformed, or asks for something that is not done here.
    pub fn load(folder: &Path, facts: &ModelFacts) -> Result<Self, LoadError> {
        let image_path = folder.join("preprocessor_config.json");
        let video_path = folder.join("video_preprocessor_config.json");
        let image: Raw = read_json(&image_path)?;
        let video: Raw = read_json_if_present(&video_path)?.unwrap_or_default();
        let image = image.pixels(&IMAGE, &image_path)?;
        let pixels = video.pixels(&VIDEO, &video_path)?;
        for (path, found) in [(&image_path, &image), (&video_path, &pixels)] {
            if facts.vision_patch.is_some_and(|patch| patch != found.patch) {
                return Err(LoadError::content(path, "`patch_size` differs from the vision tower's in config.json"));
            }
        }
        let video = VideoSettings::new(&video, pixels);
        if !(video.fps > 0.0 && video.fps.is_finite()) || video.max_frames < video.pixels.temporal {
            return Err(LoadError::content(&video_path, "`fps` or `max_frames` is out of range"));
        }
        Ok(Self { image, video })
    }
}

impl VideoSettings {
    fn new(raw: &Raw, pixels: Pixels) -> Self {
        let capped = raw.cap_pixels_per_frame == Some(true);
        Self {
            pixels,
            fps: raw.fps.unwrap_or(2.0),
            min_frames: raw.min_frames.unwrap_or(4),
            max_frames: raw.max_frames.unwrap_or(768),
            frame_cap_tokens: capped.then_some(raw.max_video_tokens.unwrap_or(768)),
        }
    }
}

#[cfg(test)]
impl ProcessorConfig {
    /// From the texts of the two files.
    pub(crate) fn from_values(image: serde_json::Value, video: serde_json::Value) -> Self {
        let image: Raw = serde_json::from_value(image).unwrap();
        let video: Raw = serde_json::from_value(video).unwrap();
        let pixels = video.pixels(&VIDEO, Path::new("video")).unwrap();
        Self { image: image.pixels(&IMAGE, Path::new("image")).unwrap(), video: VideoSettings::new(&video, pixels) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn silence_means_the_class_defaults() {
        let config = ProcessorConfig::from_values(json!({}), json!({}));
        assert_eq!((config.image.patch, config.image.bounds.min_pixels), (14, 3136));
        assert_eq!((config.video.pixels.patch, config.video.pixels.bounds.max_pixels), (16, 786_432));
        assert_eq!((config.video.fps, config.video.min_frames, config.video.max_frames), (2.0, 4, 768));
    }

    #[test]
    fn what_would_change_the_pixels_is_refused() {
        for bad in [
            json!({"do_resize": false}),
            json!({"resample": 2}),
            json!({"rescale_factor": 0.5}),
            json!({"patch_size": 0}),
        ] {
            let raw: Raw = serde_json::from_value(bad.clone()).unwrap();
            assert!(raw.pixels(&IMAGE, Path::new("x")).is_err(), "{bad}");
        }
    }
}
