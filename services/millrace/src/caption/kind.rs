//! What a file is, by its first bytes and never by its name: enough to choose the prompt and the part's type.
//! Whether the bytes decode is for the preprocess actor to say.

/// A kind of media that `millrace caption` takes, with its media type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MediaKind {
    /// A still: one job, no windows.
    Image(&'static str),
    /// Something with a duration: one job per window.
    Video(&'static str),
}

impl MediaKind {
    /// Media type such as `video/mp4`.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Image(media_type) | Self::Video(media_type) => media_type,
        }
    }

    /// Prompt for those who give none.
    pub fn default_prompt(self) -> &'static str {
        match self {
            Self::Image(_) => "Describe the image.",
            Self::Video(_) => "Describe the video.",
        }
    }
}

/// Bytes that [`sniff`] needs, except for a GIF, which it needs whole (to see whether it moves).
pub const HEAD_BYTES: usize = 64;

/// Tells the kind of a file from its first bytes; `None` if it is none that this command takes.
pub fn sniff(bytes: &[u8]) -> Option<MediaKind> {
    if bytes.starts_with(&[0xff, 0xd8, 0xff]) {
        return Some(MediaKind::Image("image/jpeg"));
    }
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        return Some(MediaKind::Image("image/png"));
    }
    if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
        return Some(MediaKind::Image("image/webp"));
    }
    if is_gif(bytes) {
        let moves = gif_frames(bytes, 2) > 1;
        return Some(if moves { MediaKind::Video("image/gif") } else { MediaKind::Image("image/gif") });
    }
    if bytes.get(4..8) == Some(b"ftyp") {
        // HEIF and AVIF stills share the container but are not taken.
        let brand = bytes.get(8..12)?;
        let still = [b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis"].iter().any(|known| brand == *known);
        return (!still).then_some(MediaKind::Video("video/mp4"));
    }
    if bytes.starts_with(&[0x1a, 0x45, 0xdf, 0xa3]) {
        let head = &bytes[..bytes.len().min(HEAD_BYTES)];
        let webm = head.windows(4).any(|four| four == b"webm");
        return Some(MediaKind::Video(if webm { "video/webm" } else { "video/x-matroska" }));
    }
    None
}

/// Whether these bytes start a GIF.
pub fn is_gif(bytes: &[u8]) -> bool {
    bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a")
}

/// Frames of a GIF, counted up to `most`; a truncated file counts what is there (GIF89a specification, §17 to §27).
fn gif_frames(bytes: &[u8], most: usize) -> usize {
    let Some(&flags) = bytes.get(10) else { return 0 };
    let mut at = 13 + colour_table_bytes(flags);
    let mut frames = 0;
    while frames < most {
        match bytes.get(at) {
            // Extension: introducer, label, sub-blocks.
            Some(0x21) => at = after_sub_blocks(bytes, at + 2),
            // Image: descriptor of 10 bytes, local colour table, code size, sub-blocks.
            Some(0x2c) => {
                let Some(&flags) = bytes.get(at + 9) else { break };
                frames += 1;
                at = after_sub_blocks(bytes, at + 11 + colour_table_bytes(flags));
            }
            _ => break,
        }
    }
    frames
}

fn colour_table_bytes(flags: u8) -> usize {
    if flags & 0x80 == 0 { 0 } else { 3 << (usize::from(flags & 7) + 1) }
}

fn after_sub_blocks(bytes: &[u8], mut at: usize) -> usize {
    while let Some(&length) = bytes.get(at) {
        at += 1 + usize::from(length);
        if length == 0 {
            break;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GIF of 1 x 1 pixel with `frames` frames, a comment between them, and colour tables if asked for.
    fn gif(frames: usize, tables: bool) -> Vec<u8> {
        let flags = if tables { 0x81 } else { 0 };
        let table = if tables { vec![7u8; 12] } else { Vec::new() };
        let mut bytes = b"GIF89a\x01\0\x01\0".to_vec();
        bytes.extend([flags, 0, 0]);
        bytes.extend(&table);
        for _ in 0..frames {
            bytes.extend([0x21, 0xfe, 2, 0x2c, 0x2c, 0]);
            bytes.extend([0x2c, 0, 0, 0, 0, 1, 0, 1, 0, flags]);
            bytes.extend(&table);
            bytes.extend([2, 2, 0x2c, 0x01, 0]);
        }
        bytes.push(0x3b);
        bytes
    }

    #[test]
    fn kinds_come_from_the_first_bytes() {
        let cases: &[(&[u8], Option<MediaKind>)] = &[
            (b"\xff\xd8\xff\xe0rest", Some(MediaKind::Image("image/jpeg"))),
            (b"\x89PNG\r\n\x1a\nrest", Some(MediaKind::Image("image/png"))),
            (b"RIFF\x10\0\0\0WEBPVP8 ", Some(MediaKind::Image("image/webp"))),
            (b"RIFF\x10\0\0\0AVI LIST", None),
            (b"\0\0\0\x20ftypisom\0\0", Some(MediaKind::Video("video/mp4"))),
            (b"\0\0\0\x20ftypheic\0\0", None),
            (b"\x1a\x45\xdf\xa3\x01\0\0\0\x42\x82\x84webm", Some(MediaKind::Video("video/webm"))),
            (b"\x1a\x45\xdf\xa3\x01\0\0\0\x42\x82\x88matroska", Some(MediaKind::Video("video/x-matroska"))),
            (b"", None),
            (b"hello", None),
            (b"%PDF-1.7", None),
        ];
        for (bytes, kind) in cases {
            assert_eq!(sniff(bytes), *kind, "{bytes:?}");
        }
    }

    #[test]
    fn a_gif_is_a_video_from_its_second_frame_on() {
        for tables in [false, true] {
            assert_eq!(sniff(&gif(1, tables)), Some(MediaKind::Image("image/gif")));
            assert_eq!(sniff(&gif(2, tables)), Some(MediaKind::Video("image/gif")));
            assert_eq!(gif_frames(&gif(5, tables), 9), 5);
        }
    }

    #[test]
    fn a_truncated_gif_counts_what_is_there() {
        let whole = gif(3, true);
        for length in 0..whole.len() {
            assert!(gif_frames(&whole[..length], 9) <= 3);
        }
    }
}
