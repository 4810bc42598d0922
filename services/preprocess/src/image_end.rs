//! Whether an encoded image has its end: decoders fill what is missing with grey instead of failing.

use image::ImageFormat;

/// `false` if the file's own structure says that bytes are missing. Formats whose decoders notice count as complete.
pub(crate) fn is_complete(bytes: &[u8], format: ImageFormat) -> bool {
    match format {
        ImageFormat::Jpeg => jpeg_has_end(bytes),
        ImageFormat::Png => png_has_end(bytes),
        ImageFormat::WebP => webp_has_end(bytes),
        _ => true,
    }
}

/// Follows the segments from SOI; true at the end-of-image marker behind a scan.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    let mut scans = 0;
    loop {
        // To the next marker: 0xFF followed by neither a stuffed 0, nor a fill byte, nor a restart number.
        let Some(offset) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xFF)) else {
            return false;
        };
        at += offset + 1;
        let Some(&marker) = bytes.get(at) else { return false };
        match marker {
            0x00 | 0xD0..=0xD7 => at += 1,
            0xFF => {}
            0xD9 => return scans > 0,
            _ => {
                scans += usize::from(marker == 0xDA);
                let Some([high, low]) = bytes.get(at + 1..at + 3) else { return false };
                at += 1 + usize::from(u16::from_be_bytes([*high, *low]));
            }
        }
    }
}

/// Follows the chunks to IEND.
fn png_has_end(bytes: &[u8]) -> bool {
    let mut at = 8;
    while let Some([a, b, c, d, kind @ ..]) = bytes.get(at..at + 8) {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        let Some(next) = at.checked_add(12).and_then(|at| at.checked_add(length)) else { return false };
        if next > bytes.len() {
            return false;
        }
        if kind == b"IEND" {
            return true;
        }
        at = next;
    }
    false
}

/// The RIFF header says how long the file is.
fn webp_has_end(bytes: &[u8]) -> bool {
    let Some([a, b, c, d]) = bytes.get(4..8) else { return false };
    bytes.len() as u64 >= u64::from(u32::from_le_bytes([*a, *b, *c, *d])) + 8
}
