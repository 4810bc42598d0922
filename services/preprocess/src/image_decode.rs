//! Encoded images to RGB, 8 bits a sample. The header decides whether the rest is looked at; alpha is dropped and the
//! EXIF orientation ignored, as in the reference. Every fault is an error of the job, also a decoder's panic.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::{ImageFormat, ImageReader, Limits};
use millrace_protocol::content::RawSize;
use millrace_protocol::{ErrorCode, JobError};

use crate::image_end::is_complete;
use crate::limits::PrepareLimits;
use crate::patchify::Rgb;

const TAKEN: &str = "send a JPEG, PNG, WebP or GIF image";

/// Decodes an image. `media_type`, if given, must be that of the bytes. Of an animation the first frame counts.
///
/// # Errors
/// `too_large`, `media_type` or `media_decode`.
pub fn decode_image(bytes: &[u8], media_type: Option<&str>, limits: &PrepareLimits) -> Result<Rgb, JobError> {
    if bytes.is_empty() {
        return Err(JobError::new(ErrorCode::MediaDecode, "the image is empty: send its bytes"));
    }
    if bytes.len() as u64 > limits.image_bytes {
        let text = format!("the image has {} bytes; at most {} are allowed", bytes.len(), limits.image_bytes);
        return Err(JobError::new(ErrorCode::TooLarge, text));
    }
    let format = sniff(bytes)?;
    check_media_type(media_type, format)?;
    // A decoder's panic must cost this job, not the worker.
    catch_unwind(AssertUnwindSafe(|| decode(bytes, format, limits)))
        .unwrap_or_else(|_| Err(corrupt("its decoder gave up on it")))
}

/// Takes raw RGB bytes of a given size.
///
/// # Errors
/// `media_decode` if the length does not fit, `too_large` beyond the pixel limit.
pub fn take_raw(bytes: &[u8], size: RawSize, limits: &PrepareLimits) -> Result<Rgb, JobError> {
    check_pixels(size.width, size.height, limits)?;
    let expected = u64::from(size.width) * u64::from(size.height) * 3;
    if bytes.len() as u64 != expected || expected == 0 {
        let text = format!(
            "raw RGB of {} x {} pixels has {expected} bytes (and at least one pixel), but {} were sent",
            size.width,
            size.height,
            bytes.len()
        );
        return Err(JobError::new(ErrorCode::MediaDecode, text));
    }
    Ok(Rgb { width: size.width, height: size.height, pixels: bytes.to_vec() })
}

fn decode(bytes: &[u8], format: ImageFormat, limits: &PrepareLimits) -> Result<Rgb, JobError> {
    let reader = || ImageReader::with_format(Cursor::new(bytes), format);
    let (width, height) = reader().into_dimensions().map_err(|error| corrupt(&error.to_string()))?;
    check_pixels(width, height, limits)?;
    if !is_complete(bytes, format) {
        return Err(corrupt("its end is missing"));
    }
    let mut reader = reader();
    let mut bounds = Limits::no_limits();
    (bounds.max_image_width, bounds.max_image_height) = (Some(width), Some(height));
    // The widest decoded form is four 16-bit channels; decoders may hold a second copy.
    bounds.max_alloc = Some(u64::from(width) * u64::from(height) * 16 + (16 << 20));
    reader.limits(bounds);
    let image = reader.decode().map_err(|error| corrupt(&error.to_string()))?;
    let rgb = image.into_rgb8();
    if (rgb.width(), rgb.height()) != (width, height) {
        return Err(corrupt("its header and its content differ in size"));
    }
    Ok(Rgb { width, height, pixels: rgb.into_raw() })
}

fn check_pixels(width: u32, height: u32, limits: &PrepareLimits) -> Result<(), JobError> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.image_pixels {
        let text =
            format!("the image has {width} x {height} pixels; send one of at most {} pixels", limits.image_pixels);
        return Err(JobError::new(ErrorCode::TooLarge, text));
    }
    Ok(())
}

fn sniff(bytes: &[u8]) -> Result<ImageFormat, JobError> {
    match bytes {
        [0xFF, 0xD8, 0xFF, ..] => Ok(ImageFormat::Jpeg),
        [0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A, ..] => Ok(ImageFormat::Png),
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Ok(ImageFormat::Gif),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok(ImageFormat::WebP),
        _ => {
            Err(JobError::new(ErrorCode::MediaType, format!("the bytes are not an image that is taken here: {TAKEN}")))
        }
    }
}

fn check_media_type(media_type: Option<&str>, format: ImageFormat) -> Result<(), JobError> {
    let Some(given) = media_type else { return Ok(()) };
    let given = given.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let actual = format.to_mime_type();
    if given == actual || (given == "image/jpg" && actual == "image/jpeg") || given == "application/octet-stream" {
        return Ok(());
    }
    let text =
        format!("`media_type` is {given:?} but the bytes are {actual}: correct one of them, or leave `media_type` out");
    Err(JobError::new(ErrorCode::MediaType, text))
}

fn corrupt(reason: &str) -> JobError {
    JobError::new(ErrorCode::MediaDecode, format!("the image cannot be decoded ({reason}): send an intact file"))
}
