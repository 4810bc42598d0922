//! Chat-style messages and their media parts, as a publisher writes them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One turn of a conversation. Fields this service does not know are kept for the chat template.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text, or a list of text and media parts.
    #[serde(default)]
    pub content: Content,
    /// Anything else the chat template reads (`tool_calls`, `reasoning_content`, `name`, ...).
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// A turn's content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Text and media in order.
    Parts(Vec<Part>),
    /// `null`: a turn that holds only tool calls.
    Null(()),
}

impl Default for Content {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// A piece of a turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text.
    Text {
        /// The text itself.
        text: String,
    },
    /// A still image (JPEG, PNG, WebP, GIF's first frame).
    Image {
        /// Where its bytes are.
        #[serde(flatten)]
        source: Source,
    },
    /// A video file (MP4, MKV, WebM, GIF), decoded by ffmpeg.
    Video {
        /// Where its bytes are.
        #[serde(flatten)]
        source: Source,
        /// Start of the window to caption, in seconds from the file's start; default 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        start_secs: Option<f64>,
        /// End of the window, in seconds; default the file's end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        end_secs: Option<f64>,
        /// Frames sampled per second; default the checkpoint's (2).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fps: Option<f64>,
    },
    /// Frames already decoded, used as they are (no sampling).
    Frames {
        /// The frames in order: encoded images, or raw ones (see [`Source::raw`]).
        frames: Vec<Source>,
        /// Frames per second of the source, for the timestamps in the prompt.
        fps: f64,
        /// Index of each frame in the source, which shows frame i at i / fps seconds; absent: 0, 1, 2, ...
        #[serde(default, skip_serializing_if = "Option::is_none")]
        indices: Option<Vec<u32>>,
    },
}

/// Where bytes are: exactly one of `data`, `object` and `url`.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema, Default)]
pub struct Source {
    /// The bytes in base64 (standard alphabet, padded).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Name of an object in the media bucket: the claim check for anything larger than a message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// A `data:` URL, or a `file://` path below a folder that `preprocess.file_roots` allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Media type such as `image/jpeg`; checked against the bytes when given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Set when the bytes are raw RGB, 8 bits a channel, rows top to bottom, without padding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<RawSize>,
}

/// Size of a raw RGB image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RawSize {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

impl std::fmt::Debug for Source {
    /// Prints sizes and names, never the payload.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("data_bytes", &self.data.as_ref().map(String::len))
            .field("object", &self.object)
            .field("url", &self.url)
            .field("media_type", &self.media_type)
            .field("raw", &self.raw)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_read_as_people_write_them() {
        let text = r#"{"role":"user","content":[
            {"type":"image","data":"AAAA","media_type":"image/png"},
            {"type":"frames","fps":2.0,"frames":[{"data":"AAAA","raw":{"width":1,"height":1}}]},
            {"type":"text","text":"What?"}]}"#;
        let message: Message = serde_json::from_str(text).unwrap();
        let Content::Parts(parts) = message.content else { panic!("not parts") };
        assert_eq!(parts.len(), 3);
        assert!(matches!(&parts[1], Part::Frames { fps, .. } if *fps == 2.0));
    }

    #[test]
    fn debug_never_prints_payload() {
        let source = Source { data: Some("SECRET".into()), ..Source::default() };
        assert!(!format!("{source:?}").contains("SECRET"));
    }
}
