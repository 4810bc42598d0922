//! From the flags of `millrace generate` to a job document. Media are named by path; [`super::media::Files`] reads them.

use anyhow::Context;
use millrace_protocol::content::{Content, Message, Part, Source};
use millrace_protocol::{JobRequest, Sampling};

use crate::exit::usage;

/// What to go on from.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// One message of a user, rendered by the chat template.
    Chat(String),
    /// Text that is tokenised as it is.
    Raw(String),
    /// A file's content: messages, or a whole job document.
    Messages(String),
    /// Token ids, used as they are.
    Ids(Vec<u32>),
}

/// The media named on the command line.
#[derive(Debug, Clone, Default)]
pub struct MediaFlags {
    /// `--image`
    pub images: Vec<String>,
    /// `--video`
    pub videos: Vec<String>,
    /// Each `--frames` with its `--fps`: decoded frames, and how many of them make a second.
    pub frames: Vec<(Vec<String>, f64)>,
    /// `--fps` for videos: frames sampled per second.
    pub sample_fps: Option<f64>,
}

impl MediaFlags {
    /// As parts of a message: images, then videos, then frames.
    pub fn parts(&self) -> Vec<Part> {
        let source = |path: &String| Source { object: Some(path.clone()), ..Source::default() };
        let image = |path| Part::Image { source: source(path) };
        let video = |path| Part::Video { source: source(path), start_secs: None, end_secs: None, fps: self.sample_fps };
        let frames = self.frames.iter().map(|(frames, fps)| Part::Frames {
            frames: frames.iter().map(source).collect(),
            fps: *fps,
            indices: None,
        });
        self.images.iter().map(image).chain(self.videos.iter().map(video)).chain(frames).collect()
    }
}

/// The job that the prompt and the media make; of `flags` the temperature, the seed and the log-probabilities count.
///
/// # Errors
/// A usage fault for a messages file that holds neither, or media without a place.
pub fn request(prompt: &Prompt, media: &MediaFlags, flags: &Sampling) -> anyhow::Result<JobRequest> {
    let parts = media.parts();
    let job = match prompt {
        Prompt::Chat(text) => {
            let mut parts = parts;
            parts.push(Part::Text { text: text.clone() });
            JobRequest { messages: Some(vec![user(parts)]), ..JobRequest::default() }
        }
        Prompt::Raw(_) if !parts.is_empty() => {
            return Err(usage("--raw: media need the chat template, or --ids with their placeholders"));
        }
        Prompt::Raw(text) => JobRequest { prompt: Some(text.clone()), ..JobRequest::default() },
        Prompt::Messages(text) => with_media(from_file(text)?, parts)?,
        // The media are prepared by a message of their own and then put in place.
        Prompt::Ids(_) if !parts.is_empty() => {
            JobRequest { messages: Some(vec![user(parts)]), ..JobRequest::default() }
        }
        Prompt::Ids(ids) => JobRequest { prompt_token_ids: Some(ids.clone()), ..JobRequest::default() },
    };
    // A whole job document keeps what it says where no flag does.
    let sampling = Sampling {
        temperature: flags.temperature.or(job.sampling.temperature),
        seed: flags.seed.or(job.sampling.seed),
        logprobs: flags.logprobs.or(job.sampling.logprobs),
        ..job.sampling
    };
    Ok(JobRequest { sampling, ..job })
}

fn user(parts: Vec<Part>) -> Message {
    Message { role: "user".to_string(), content: Content::Parts(parts), extra: serde_json::Map::new() }
}

fn from_file(text: &str) -> anyhow::Result<JobRequest> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| usage(format!("--messages: {error}")))?;
    if value.is_array() {
        let messages = serde_json::from_value(value).map_err(|error| usage(format!("--messages: {error}")))?;
        return Ok(JobRequest { messages: Some(messages), ..JobRequest::default() });
    }
    serde_json::from_value(value)
        .map_err(|error| usage(format!("--messages: neither a list of messages nor a job document: {error}")))
}

/// Puts the media before the last user message's own content.
fn with_media(mut job: JobRequest, parts: Vec<Part>) -> anyhow::Result<JobRequest> {
    if parts.is_empty() {
        return Ok(job);
    }
    let last_user = job.messages.iter_mut().flatten().rev().find(|message| message.role == "user");
    let message =
        last_user.context("--messages: no user message for the media").map_err(|error| usage(error.to_string()))?;
    let own = match std::mem::take(&mut message.content) {
        Content::Text(text) => vec![Part::Text { text }],
        Content::Parts(own) => own,
        Content::Null(()) => Vec::new(),
    };
    message.content = Content::Parts(parts.into_iter().chain(own).collect());
    Ok(job)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(prompt: Prompt, media: &MediaFlags) -> Result<serde_json::Value, String> {
        let job = request(&prompt, media, &Sampling::default()).map_err(|error| error.to_string())?;
        Ok(serde_json::to_value(job).unwrap())
    }

    fn image() -> MediaFlags {
        MediaFlags { images: vec!["a.png".into()], ..MediaFlags::default() }
    }

    #[test]
    fn a_prompt_is_a_message_and_raw_text_is_none() {
        let chat = json(Prompt::Chat("Hi".into()), &image()).unwrap();
        assert_eq!(chat["messages"][0]["content"][0]["object"], "a.png");
        assert_eq!(chat["messages"][0]["content"][1]["text"], "Hi");
        assert_eq!(json(Prompt::Raw("Hi".into()), &MediaFlags::default()).unwrap()["prompt"], "Hi");
        assert!(json(Prompt::Raw("Hi".into()), &image()).unwrap_err().contains("--ids"));
    }

    #[test]
    fn messages_come_as_a_list_or_a_job() {
        let list = r#"[{"role":"system","content":"S"},{"role":"user","content":"Hi"}]"#;
        let with_image = json(Prompt::Messages(list.into()), &image()).unwrap();
        assert_eq!(with_image["messages"][1]["content"][0]["type"], "image");
        assert_eq!(with_image["messages"][1]["content"][1]["text"], "Hi");
        let job = r#"{"prompt":"x","sampling":{"seed":7}}"#;
        assert_eq!(json(Prompt::Messages(job.into()), &MediaFlags::default()).unwrap()["sampling"]["seed"], 7);
        assert!(json(Prompt::Messages("[1]".into()), &MediaFlags::default()).unwrap_err().starts_with("--messages"));
        assert!(json(Prompt::Messages(job.into()), &image()).unwrap_err().contains("no user message"));
    }
}
