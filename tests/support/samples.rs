//! Held-out requests with transformers' answers (deploy/demo/eval), as jobs.

use std::io::Read;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::read::GzDecoder;
use millrace_protocol::content::RawSize;
use millrace_protocol::{Content, JobRequest, Message, Part, Sampling, Source};
use serde::Deserialize;

use crate::workspace::root;

/// One request and what transformers answered.
#[derive(Debug, Clone, Deserialize)]
pub struct Sample {
    /// Its number, and its file's stem.
    pub id: String,
    /// Kind of scene.
    pub category: String,
    kind: String,
    file: String,
    media: Vec<Size>,
    fps: Option<f64>,
    frame_indices: Option<Vec<u32>>,
    system: Option<String>,
    before: String,
    after: String,
    /// Prompt after expansion, as transformers tokenised it.
    pub input_ids: Vec<u32>,
    /// transformers' greedy answer in float32.
    pub text_f32: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Size {
    width: u32,
    height: u32,
    frames: u32,
}

#[derive(Deserialize)]
struct Index {
    samples: Vec<Sample>,
}

/// The samples that are committed.
///
/// # Errors
/// If the folder is not as its export script writes it.
pub fn committed() -> Result<Vec<Sample>> {
    let folder = root().join("deploy/demo/eval");
    let text = std::fs::read_to_string(folder.join("index.json")).context("deploy/demo/eval/index.json")?;
    Ok(serde_json::from_str::<Index>(&text)?.samples)
}

impl Sample {
    /// The sample as a greedy job with raw frames inside.
    ///
    /// # Errors
    /// If its file is not what the index says.
    pub fn job(&self) -> Result<JobRequest> {
        let path = root().join("deploy/demo/eval").join(&self.file);
        let mut pixels = Vec::new();
        GzDecoder::new(std::fs::File::open(&path)?).read_to_end(&mut pixels)?;
        let mut rest = pixels.as_slice();
        let mut parts = Vec::new();
        if !self.before.is_empty() {
            parts.push(Part::Text { text: self.before.clone() });
        }
        for size in &self.media {
            let bytes = size.width as usize * size.height as usize * 3;
            let mut frames = Vec::new();
            for _ in 0..size.frames {
                ensure!(rest.len() >= bytes, "{} is too short", self.file);
                let (frame, after) = rest.split_at(bytes);
                rest = after;
                frames.push(Source {
                    data: Some(STANDARD.encode(frame)),
                    raw: Some(RawSize { width: size.width, height: size.height }),
                    ..Source::default()
                });
            }
            parts.push(self.part(frames)?);
        }
        ensure!(rest.is_empty(), "{} is too long", self.file);
        if !self.after.is_empty() {
            parts.push(Part::Text { text: self.after.clone() });
        }
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(message("system", Content::Text(system.clone())));
        }
        messages.push(message("user", Content::Parts(parts)));
        let sampling = Sampling { temperature: Some(0.0), ..Sampling::default() };
        Ok(JobRequest { messages: Some(messages), sampling, ..JobRequest::default() })
    }

    fn part(&self, mut frames: Vec<Source>) -> Result<Part> {
        Ok(match self.kind.as_str() {
            "video" => Part::Frames { frames, fps: self.fps.context("no fps")?, indices: self.frame_indices.clone() },
            _ => Part::Image { source: frames.pop().context("no frame")? },
        })
    }
}

/// A user's message.
pub fn message(role: &str, content: Content) -> Message {
    Message { role: role.into(), content, extra: serde_json::Map::new() }
}
