//! Encoded images: what is decoded, what is refused, and that no prefix of a file gets through or panics.

use std::io::Cursor;

use image::{DynamicImage, ImageFormat, RgbImage, RgbaImage};
use millrace_protocol::ErrorCode;

use crate::golden_tests::noise;
use crate::image_decode::decode_image;
use crate::limits::PrepareLimits;

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    image.write_to(&mut out, format).unwrap();
    out.into_inner()
}

fn picture(width: u32, height: u32) -> DynamicImage {
    let pixels = noise(9, (width * height * 3) as usize);
    DynamicImage::ImageRgb8(RgbImage::from_raw(width, height, pixels).unwrap())
}

fn code(bytes: &[u8], media_type: Option<&str>) -> Result<(), ErrorCode> {
    decode_image(bytes, media_type, &PrepareLimits::default()).map(|_| ()).map_err(|error| error.code)
}

#[test]
fn lossless_formats_come_back_equal() {
    let image = picture(13, 7);
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        let got =
            decode_image(&encoded(&image, format), Some(format.to_mime_type()), &PrepareLimits::default()).unwrap();
        assert_eq!((got.width, got.height), (13, 7));
        assert_eq!(got.pixels, image.to_rgb8().into_raw(), "{format:?}");
    }
}

#[test]
fn alpha_is_dropped_and_wide_or_grey_samples_become_rgb() {
    let pixels: Vec<u8> = (0..4 * 6).collect();
    let rgba = DynamicImage::ImageRgba8(RgbaImage::from_raw(3, 2, pixels.clone()).unwrap());
    let got = decode_image(&encoded(&rgba, ImageFormat::Png), None, &PrepareLimits::default()).unwrap();
    let expected: Vec<u8> = pixels.chunks_exact(4).flat_map(|pixel| pixel[..3].to_vec()).collect();
    assert_eq!(got.pixels, expected);
    let wide = DynamicImage::ImageRgb16(picture(5, 5).to_rgb16());
    let got = decode_image(&encoded(&wide, ImageFormat::Png), None, &PrepareLimits::default()).unwrap();
    assert_eq!(got.pixels, picture(5, 5).to_rgb8().into_raw());
    let grey = DynamicImage::ImageLuma8(picture(4, 4).to_luma8());
    let got = decode_image(&encoded(&grey, ImageFormat::Png), None, &PrepareLimits::default()).unwrap();
    assert!(got.pixels.chunks_exact(3).all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]));
}

#[test]
fn no_prefix_of_a_file_is_an_image() {
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
        let whole = encoded(&picture(21, 17), format);
        assert_eq!(code(&whole, None), Ok(()), "{format:?}");
        for length in 0..whole.len() {
            let refused = code(&whole[..length], None);
            assert!(
                matches!(refused, Err(ErrorCode::MediaDecode | ErrorCode::MediaType)),
                "{format:?} {length}: {refused:?}"
            );
        }
    }
}

#[test]
fn flipped_bytes_never_panic() {
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif] {
        let whole = encoded(&picture(9, 9), format);
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xA5;
            // Either outcome is right for a changed byte; what counts is that there is one, and with these codes.
            let outcome = code(&bytes, None);
            let expected = [ErrorCode::MediaDecode, ErrorCode::MediaType, ErrorCode::TooLarge];
            assert!(
                outcome.is_ok() || outcome.is_err_and(|code| expected.contains(&code)),
                "{format:?} {at}: {outcome:?}"
            );
        }
    }
}

/// A PNG that claims a size and holds nothing.
fn png_of(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = vec![0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A];
    let chunk = |bytes: &mut Vec<u8>, kind: &[u8; 4], body: &[u8]| {
        bytes.extend((body.len() as u32).to_be_bytes());
        let mut crc = u32::MAX;
        for byte in kind.iter().chain(body) {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0xEDB8_8320 * (crc & 1));
            }
        }
        bytes.extend(kind);
        bytes.extend(body);
        bytes.extend((!crc).to_be_bytes());
    };
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    chunk(&mut bytes, b"IHDR", &header);
    chunk(&mut bytes, b"IDAT", &[]);
    chunk(&mut bytes, b"IEND", &[]);
    bytes
}

#[test]
fn a_header_that_claims_too_much_is_refused_before_decoding() {
    assert_eq!(code(&png_of(60_000, 60_000), None), Err(ErrorCode::TooLarge));
    assert_eq!(code(&png_of(1_000_000, 1_000_000), None), Err(ErrorCode::TooLarge));
    // Within the limit the missing content shows.
    assert_eq!(code(&png_of(8, 8), None), Err(ErrorCode::MediaDecode));
    let mut gif = encoded(&picture(4, 4), ImageFormat::Gif);
    gif[6..10].fill(0xFF);
    assert_eq!(code(&gif, None), Err(ErrorCode::TooLarge));
}

#[test]
fn types_must_agree_and_be_known() {
    let png = encoded(&picture(4, 4), ImageFormat::Png);
    assert_eq!(code(&png, Some("IMAGE/PNG; charset=x")), Ok(()));
    assert_eq!(code(&png, Some("image/jpeg")), Err(ErrorCode::MediaType));
    assert_eq!(code(&encoded(&picture(4, 4), ImageFormat::Jpeg), Some("image/jpg")), Ok(()));
    assert_eq!(code(b"<svg xmlns='http://www.w3.org/2000/svg'/>", None), Err(ErrorCode::MediaType));
    assert_eq!(code(b"", None), Err(ErrorCode::MediaDecode));
    let limits = PrepareLimits { image_bytes: 10, ..PrepareLimits::default() };
    assert_eq!(decode_image(&png, None, &limits).unwrap_err().code, ErrorCode::TooLarge);
}
