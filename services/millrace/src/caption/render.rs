//! A caption as text and as JSON. Pure: takes values, returns strings.

use millrace_protocol::output::{Final, Status, Timings, Usage};
use serde::Serialize;

use super::timecode::span;
use super::window::Window;

/// Which part of which file an answer belongs to.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// The file as it was named on the command line, `-` for standard input.
    pub path: String,
    /// The part of it; `None` for a still or a video of unknown length.
    pub window: Option<Window>,
}

impl Place {
    /// What goes in front of a caption: the path if there are several, and the time codes if there are any.
    pub fn label(&self, with_path: bool) -> String {
        let time = self.window.map(|window| span(window.start_secs, window.end_secs));
        match (with_path, time) {
            (true, Some(time)) => format!("{} {time}", self.path),
            (true, None) => format!("{}:", self.path),
            (false, Some(time)) => time,
            (false, None) => String::new(),
        }
    }
}

/// One finished caption for a person: label and text; further lines of the text are indented.
pub fn caption_line(place: &Place, with_path: bool, text: &str) -> String {
    let label = place.label(with_path);
    let text = text.trim().replace('\n', "\n    ");
    if label.is_empty() { text } else { format!("{label} {text}") }
}

/// One failed caption for a person: where, the code, and the sentence that says what to do.
pub fn failure_line(place: &Place, last: &Final) -> String {
    let place_text = place.window.map_or_else(|| place.path.clone(), |_| place.label(true));
    match &last.error {
        Some(error) => format!("{place_text}: {} [{}]: {}", last.status.as_str(), error.code.as_str(), error.message),
        None => format!("{place_text}: {}", last.status.as_str()),
    }
}

/// One line of `--json`.
#[derive(Debug, Serialize)]
pub struct CaptionRecord<'a> {
    /// The file.
    pub path: &'a str,
    /// Start of the window, in seconds; null for a still.
    pub start: Option<f64>,
    /// End of the window, in seconds.
    pub end: Option<f64>,
    /// The text; what there is of it if the job failed.
    pub caption: &'a str,
    /// `done`, `rejected`, `cancelled`, `expired` or `failed`.
    pub status: Status,
    /// Code, number and message of what went wrong.
    pub error: Option<&'a millrace_protocol::JobError>,
    /// Token counts.
    pub usage: Usage,
    /// Durations, in milliseconds.
    pub timings: Timings,
    /// The job, for `millrace result`.
    pub job: &'a str,
}

impl<'a> CaptionRecord<'a> {
    /// The record of one job's end.
    pub fn new(place: &'a Place, job: &'a str, last: &'a Final) -> Self {
        Self {
            path: &place.path,
            start: place.window.map(|window| window.start_secs),
            end: place.window.map(|window| window.end_secs),
            caption: &last.text,
            status: last.status,
            error: last.error.as_ref(),
            usage: last.usage,
            timings: last.timings,
            job,
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::{ErrorCode, JobError};

    use super::*;

    fn place(window: Option<(f64, f64)>) -> Place {
        let window = window.map(|(start_secs, end_secs)| Window { start_secs, end_secs });
        Place { path: "clip.mp4".into(), window }
    }

    fn last(status: Status, error: Option<JobError>) -> Final {
        Final {
            error,
            text: "a red circle.".into(),
            token_ids: vec![1],
            usage: Usage { prompt_tokens: 10, cached_tokens: 0, completion_tokens: 4 },
            ..Final::bare(status)
        }
    }

    #[test]
    fn a_caption_carries_time_codes_and_paths_where_they_help() {
        let (clip, still) = (place(Some((0.0, 8.0))), place(None));
        assert_eq!(caption_line(&clip, false, " a red circle. "), "[00:00.0 – 00:08.0] a red circle.");
        assert_eq!(caption_line(&clip, true, "x"), "clip.mp4 [00:00.0 – 00:08.0] x");
        assert_eq!(caption_line(&still, false, "x\ny"), "x\n    y");
        assert_eq!(caption_line(&still, true, "x"), "clip.mp4: x");
    }

    #[test]
    fn a_failure_names_the_code_and_the_sentence() {
        let error = JobError::new(ErrorCode::MediaDecode, "The file ends early: send it whole.");
        let failed = last(Status::Rejected, Some(error));
        assert_eq!(
            failure_line(&place(Some((8.0, 16.0))), &failed),
            "clip.mp4 [00:08.0 – 00:16.0]: rejected [media_decode]: The file ends early: send it whole."
        );
        assert_eq!(failure_line(&place(None), &last(Status::Cancelled, None)), "clip.mp4: cancelled");
    }

    #[test]
    fn json_has_every_key_on_one_line() {
        let (place, last) = (place(Some((0.0, 8.0))), last(Status::Done, None));
        let text = serde_json::to_string(&CaptionRecord::new(&place, "j-0", &last)).unwrap();
        assert_eq!(
            text,
            concat!(
                r#"{"path":"clip.mp4","start":0.0,"end":8.0,"caption":"a red circle.","status":"done","error":null,"#,
                r#""usage":{"prompt_tokens":10,"cached_tokens":0,"completion_tokens":4},"#,
                r#""timings":{"preprocess_ms":0.0,"queue_ms":0.0,"first_token_ms":0.0,"total_ms":0.0},"job":"j-0"}"#
            )
        );
    }
}
