//! Builds the job document of one window or still. Pure: ids, time and bytes come from outside.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use millrace_protocol::content::{Content, Message, Part, Source};
use millrace_protocol::{JobId, JobRequest, ModelName, Sampling};

use super::kind::MediaKind;
use super::window::Window;

/// Files up to this size travel inside the job (base64 makes 4/3 of it, below NATS' 1 MiB message); larger ones
/// through the media bucket.
pub const INLINE_LIMIT_BYTES: u64 = 512 * 1024;

/// Where the preprocess actor finds the file's bytes.
#[derive(Clone)]
pub enum Carrier {
    /// In the job itself.
    Inline(Vec<u8>),
    /// In the media bucket, under this name.
    Object(String),
}

impl Carrier {
    fn source(&self, media_type: &str) -> Source {
        let media_type = Some(media_type.to_string());
        match self {
            Self::Inline(bytes) => Source { data: Some(STANDARD.encode(bytes)), media_type, ..Source::default() },
            Self::Object(name) => Source { object: Some(name.clone()), media_type, ..Source::default() },
        }
    }
}

/// Whether a file of `size_bytes` that `jobs` jobs need is cheaper inside them than in the bucket.
pub fn fits_inline(size_bytes: u64, jobs: usize) -> bool {
    size_bytes.saturating_mul(u64::try_from(jobs.max(1)).unwrap_or(u64::MAX)) <= INLINE_LIMIT_BYTES
}

/// What all jobs of one `millrace caption` share.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// Model asked for.
    pub model: ModelName,
    /// Prompt; `None` takes the kind's.
    pub prompt: Option<String>,
    /// Frames sampled per second of video; `None` takes the checkpoint's.
    pub fps: Option<f64>,
    /// Longest answer, in tokens.
    pub max_tokens: Option<u32>,
    /// 0 to 9.
    pub priority: Option<u8>,
    /// Latest useful moment, in milliseconds since 1970.
    pub deadline_unix_ms: Option<u64>,
}

/// The job that captions `window` of a file (the whole of it if `None`).
pub fn caption_job(
    id: JobId,
    kind: MediaKind,
    carrier: &Carrier,
    window: Option<Window>,
    wishes: &Wishes,
) -> JobRequest {
    let source = carrier.source(kind.media_type());
    let media = match kind {
        MediaKind::Image(_) => Part::Image { source },
        MediaKind::Video(_) => Part::Video {
            source,
            start_secs: window.map(|window| window.start_secs),
            end_secs: window.map(|window| window.end_secs),
            fps: wishes.fps,
        },
    };
    let prompt = wishes.prompt.clone().unwrap_or_else(|| kind.default_prompt().to_string());
    let content = Content::Parts(vec![media, Part::Text { text: prompt }]);
    let message = Message { role: "user".to_string(), content, extra: serde_json::Map::new() };
    JobRequest {
        id: Some(id),
        model: Some(wishes.model.clone()),
        messages: Some(vec![message]),
        // Captions are facts, not inventions: the likeliest token, and the same text on every run.
        sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
        max_tokens: wishes.max_tokens,
        priority: wishes.priority,
        deadline_unix_ms: wishes.deadline_unix_ms,
        ..JobRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes() -> Wishes {
        Wishes {
            model: ModelName::new("demo").unwrap(),
            prompt: None,
            fps: None,
            max_tokens: None,
            priority: None,
            deadline_unix_ms: None,
        }
    }

    fn json(job: &JobRequest) -> String {
        serde_json::to_string(job).unwrap()
    }

    #[test]
    fn a_still_travels_inline() {
        let id = JobId::new("a").unwrap();
        let job = caption_job(id, MediaKind::Image("image/png"), &Carrier::Inline(b"Hi".to_vec()), None, &wishes());
        assert_eq!(
            json(&job),
            concat!(
                r#"{"id":"a","model":"demo","messages":[{"role":"user","content":["#,
                r#"{"type":"image","data":"SGk=","media_type":"image/png"},{"type":"text","text":"Describe the image."}]}],"#,
                r#""sampling":{"temperature":0.0}}"#
            )
        );
    }

    #[test]
    fn a_window_refers_to_the_object() {
        let id = JobId::new("a-1").unwrap();
        let window = Window { start_secs: 8.0, end_secs: 12.5 };
        let wishes = Wishes { prompt: Some("What moves?".into()), fps: Some(4.0), priority: Some(7), ..wishes() };
        let kind = MediaKind::Video("video/mp4");
        let job = caption_job(id, kind, &Carrier::Object("b3-00ff".into()), Some(window), &wishes);
        assert_eq!(
            json(&job),
            concat!(
                r#"{"id":"a-1","model":"demo","messages":[{"role":"user","content":["#,
                r#"{"type":"video","object":"b3-00ff","media_type":"video/mp4","start_secs":8.0,"end_secs":12.5,"fps":4.0},"#,
                r#"{"type":"text","text":"What moves?"}]}],"sampling":{"temperature":0.0},"priority":7}"#
            )
        );
    }

    #[test]
    fn the_inline_limit_counts_every_copy() {
        assert!(fits_inline(INLINE_LIMIT_BYTES, 1));
        assert!(!fits_inline(INLINE_LIMIT_BYTES + 1, 1));
        assert!(!fits_inline(INLINE_LIMIT_BYTES / 2, 3));
        assert!(!fits_inline(u64::MAX, 2));
    }
}
