//! What a subscriber reads on a job's output subject: claims, deltas, and exactly one final message.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::JobError;
use crate::ids::{ActorId, JobId};
use crate::sampling::TokenLogprobs;

/// One stored message of a job's output subject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OutputChunk {
    /// Schema version, 1.
    pub v: u32,
    /// The job.
    pub job: JobId,
    /// Number of answer tokens in all earlier chunks: the index of this chunk's first token.
    pub index: u64,
    /// What happened.
    #[serde(flatten)]
    pub chunk: Chunk,
}

/// The kinds of output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Chunk {
    /// An owner took the job up (again). From here on only this owner can write.
    Claim {
        /// Scheduler that writes from now on.
        owner: ActorId,
        /// Sequence of the job's message in the work queue: tells a redelivery from a second submission.
        job_seq: u64,
        /// 1 for the first delivery.
        attempt: u32,
    },
    /// New text.
    Delta {
        /// The tokens of this text, so that another process can go on from here.
        token_ids: Vec<u32>,
        /// Text to append; never half a character, never part of a stop text.
        text: String,
        /// One per token, if asked for.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        logprobs: Vec<TokenLogprobs>,
    },
    /// The job's only terminal message.
    Final(Box<Final>),
}

/// How and why a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Final {
    /// The outcome.
    pub status: Status,
    /// Why the answer ended, for `done`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// The stop text that ended the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<String>,
    /// What went wrong, for every status but `done`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<JobError>,
    /// The whole answer so far, also after resuming.
    pub text: String,
    /// The whole answer's tokens; the end-of-text token is counted in `usage` but not listed.
    pub token_ids: Vec<u32>,
    /// Log-probabilities of `token_ids` from the last chunk on, if asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprobs>,
    /// Counts.
    pub usage: Usage,
    /// Where the time went.
    #[serde(default)]
    pub timings: Timings,
    /// The publisher's `metadata`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<serde_json::Value>,
}

impl Final {
    /// An end of which nothing else is known: no text, no counts.
    pub fn bare(status: Status) -> Self {
        Self {
            status,
            finish_reason: None,
            stop: None,
            error: None,
            text: String::new(),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            usage: Usage::default(),
            timings: Timings::default(),
            metadata: None,
        }
    }
}

/// The five ways a job can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Answered.
    Done,
    /// Refused: the job itself is at fault.
    Rejected,
    /// Cancelled by its publisher.
    Cancelled,
    /// Its deadline passed.
    Expired,
    /// The service is at fault.
    Failed,
}

impl Status {
    /// Every status, for metrics.
    pub const ALL: [Status; 5] = [Status::Done, Status::Rejected, Status::Cancelled, Status::Expired, Status::Failed];

    /// Metric label and JSON text.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Done => "done",
            Status::Rejected => "rejected",
            Status::Cancelled => "cancelled",
            Status::Expired => "expired",
            Status::Failed => "failed",
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-text or stop token, or a stop text.
    Stop,
    /// `max_tokens` or the model's length was reached.
    Length,
}

/// Token counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// Prompt tokens, placeholders of media included.
    pub prompt_tokens: u64,
    /// Prompt tokens whose keys and values were already cached.
    pub cached_tokens: u64,
    /// Generated tokens, the end-of-text token included.
    pub completion_tokens: u64,
}

/// Durations as the owner's monotonic clock saw them, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Timings {
    /// Decoding, resizing, templating and tokenising.
    pub preprocess_ms: f64,
    /// From the scheduler's acceptance to the first plan that holds the job.
    pub queue_ms: f64,
    /// From acceptance to the first token.
    pub first_token_ms: f64,
    /// From acceptance to the end.
    pub total_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delta_is_flat_json() {
        let chunk = OutputChunk {
            v: 1,
            job: JobId::new("a").unwrap(),
            index: 3,
            chunk: Chunk::Delta { token_ids: vec![7], text: "x".into(), logprobs: vec![] },
        };
        let text = serde_json::to_string(&chunk).unwrap();
        assert_eq!(text, r#"{"v":1,"job":"a","index":3,"kind":"delta","token_ids":[7],"text":"x"}"#);
        assert_eq!(serde_json::from_str::<OutputChunk>(&text).unwrap(), chunk);
    }
}
