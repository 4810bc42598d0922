//! Target sizes of images and video frames, as the reference's `smart_resize` functions choose them
//! (transformers 5.17, qwen2_vl image processor and qwen3_vl video processor). Sizes only, no pixels.

use millrace_protocol::{ErrorCode, JobError};

/// Largest ratio of the sides that the reference accepts.
const MAX_ASPECT: f64 = 200.0;

/// What bounds a target size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SizeBounds {
    /// Sides become multiples of this: patch size times merge size.
    pub factor: u32,
    /// Least area, in pixels (for video: times frames).
    pub min_pixels: u64,
    /// Greatest area, in pixels (for video: times frames).
    pub max_pixels: u64,
}

/// Height and width to which an image of `height` x `width` is resized.
///
/// # Errors
/// `invalid_value` if a side is 0 or the sides' ratio exceeds 200.
pub fn image_size(height: u32, width: u32, bounds: SizeBounds) -> Result<(u32, u32), JobError> {
    let (h, w) = (f64::from(height), f64::from(width));
    check_sides(h, w)?;
    Ok(choose(h, w, 1.0, 1.0, bounds))
}

/// Height and width to which each of `frames` frames of `height` x `width` is resized. `temporal` is the temporal patch size.
///
/// # Errors
/// `invalid_value` if there are fewer frames than `temporal`, a side is 0 or the sides' ratio exceeds 200.
pub fn video_size(
    frames: u32,
    height: u32,
    width: u32,
    temporal: u32,
    bounds: SizeBounds,
) -> Result<(u32, u32), JobError> {
    if frames < temporal {
        let text =
            format!("a video needs at least {temporal} frames and has {frames}: send a single frame as an image");
        return Err(JobError::new(ErrorCode::InvalidValue, text));
    }
    let (mut h, mut w) = (f64::from(height), f64::from(width));
    check_nonzero(h, w)?;
    let factor = f64::from(bounds.factor);
    if h < factor || w < factor {
        let scale = (factor / h).max(factor / w);
        (h, w) = ((h * scale).trunc(), (w * scale).trunc());
    }
    check_sides(h, w)?;
    let rounded_frames = (f64::from(frames) / f64::from(temporal)).round_ties_even() * f64::from(temporal);
    Ok(choose(h, w, f64::from(frames), rounded_frames, bounds))
}

/// The rule both share. `frames` enters the scale, `rounded_frames` the comparison with the bounds.
fn choose(h: f64, w: f64, frames: f64, rounded_frames: f64, bounds: SizeBounds) -> (u32, u32) {
    let factor = f64::from(bounds.factor);
    let (min, max) = (bounds.min_pixels as f64, bounds.max_pixels as f64);
    let mut target_h = (h / factor).round_ties_even() * factor;
    let mut target_w = (w / factor).round_ties_even() * factor;
    let area = rounded_frames * target_h * target_w;
    if area > max {
        let beta = ((frames * h * w) / max).sqrt();
        target_h = factor.max((h / beta / factor).floor() * factor);
        target_w = factor.max((w / beta / factor).floor() * factor);
    } else if area < min {
        let beta = (min / (frames * h * w)).sqrt();
        target_h = (h * beta / factor).ceil() * factor;
        target_w = (w * beta / factor).ceil() * factor;
    }
    // A bound of 0 pixels would leave a side of 0.
    (target_h.max(factor) as u32, target_w.max(factor) as u32)
}

fn check_nonzero(h: f64, w: f64) -> Result<(), JobError> {
    if h < 1.0 || w < 1.0 {
        return Err(JobError::new(
            ErrorCode::MediaDecode,
            "the media has no pixels: send one with a width and a height",
        ));
    }
    Ok(())
}

fn check_sides(h: f64, w: f64) -> Result<(), JobError> {
    check_nonzero(h, w)?;
    let aspect = h.max(w) / h.min(w);
    if aspect > MAX_ASPECT {
        let text = format!(
            "the media is {aspect:.0} times as long as it is wide ({w} x {h}); crop it to at most {MAX_ASPECT}"
        );
        return Err(JobError::new(ErrorCode::InvalidValue, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: SizeBounds = SizeBounds { factor: 32, min_pixels: 65_536, max_pixels: 16_777_216 };
    const VIDEO: SizeBounds = SizeBounds { factor: 32, min_pixels: 4_096, max_pixels: 25_165_824 };

    #[test]
    fn images_of_the_specification() {
        for (from, to) in [
            ((100, 150), (224, 320)),
            ((480, 640), (480, 640)),
            ((1080, 1920), (1088, 1920)),
            ((16, 16), (256, 256)),
            ((5000, 4000), (4576, 3648)),
            ((33, 6000), (32, 6016)),
            ((48, 80), (224, 352)),
            ((240, 304), (256, 320)),
        ] {
            assert_eq!(image_size(from.0, from.1, IMAGE), Ok(to), "{from:?}");
        }
    }

    #[test]
    fn videos_of_the_specification() {
        for ((n, h, w), to) in [
            ((10, 64, 96), (64, 96)),
            ((20, 1080, 1920), (832, 1472)),
            ((768, 1080, 1920), (128, 224)),
            ((600, 720, 1280), (128, 256)),
            ((4, 20, 30), (32, 64)),
            ((5, 360, 640), (352, 640)),
        ] {
            assert_eq!(video_size(n, h, w, 2, VIDEO), Ok(to), "{n} {h} {w}");
        }
    }

    #[test]
    fn refusals_have_codes() {
        assert_eq!(image_size(1, 201, IMAGE).unwrap_err().code, ErrorCode::InvalidValue);
        assert!(image_size(1, 200, IMAGE).is_ok());
        assert_eq!(image_size(0, 5, IMAGE).unwrap_err().code, ErrorCode::MediaDecode);
        assert_eq!(video_size(1, 64, 64, 2, VIDEO).unwrap_err().code, ErrorCode::InvalidValue);
        assert_eq!(video_size(2, 0, 64, 2, VIDEO).unwrap_err().code, ErrorCode::MediaDecode);
    }
}
