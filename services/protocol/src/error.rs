//! Stable error codes: what a publisher can match on. A code never changes its meaning.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $number:literal;)*) => {
        /// Why a job ended without a full answer. The text form is stable; the number follows HTTP's meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
        }

        impl ErrorCode {
            /// Every code, for documents and metrics.
            pub const ALL: &[ErrorCode] = &[$(ErrorCode::$variant,)*];

            /// Stable text, also the bounded metric label.
            pub fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$variant => $text,)* }
            }

            /// Number in HTTP's sense (`Nats-Service-Error-Code`).
            pub fn number(self) -> u16 {
                match self { $(ErrorCode::$variant => $number,)* }
            }
        }
    };
}

codes! {
    /// The job is not a JSON document of the job schema.
    BadRequest = "bad_request", 400;
    /// A field holds a value outside its range.
    InvalidValue = "invalid_value", 400;
    /// The job has none or several of `messages`, `prompt` and `prompt_token_ids`.
    NoPrompt = "no_prompt", 400;
    /// The checkpoint's chat template refused the messages.
    Template = "template", 400;
    /// Token ids outside the model's vocabulary.
    TokenRange = "token_range", 400;
    /// Placeholders in the prompt do not match the media given.
    MediaMismatch = "media_mismatch", 400;
    /// No model of that name is served.
    UnknownModel = "unknown_model", 404;
    /// A referenced object does not exist.
    MediaMissing = "media_missing", 404;
    /// The deadline passed, or cannot be met.
    DeadlineExceeded = "deadline_exceeded", 408;
    /// Another owner continues this job.
    Conflict = "conflict", 409;
    /// The job or one of its media is larger than allowed.
    TooLarge = "too_large", 413;
    /// The prompt and the tokens asked for do not fit the model or the KV pool.
    ContextLength = "context_length", 413;
    /// Not a kind of media this service or this model takes.
    MediaType = "media_type", 415;
    /// The media is corrupt, truncated or empty.
    MediaDecode = "media_decode", 422;
    /// The job brought down its worker too many times.
    Poison = "poison", 422;
    /// Cancelled by its publisher.
    Cancelled = "cancelled", 499;
    /// A bug or a device fault; the text says what is known.
    Internal = "internal", 500;
    /// The logits of this sequence were not finite.
    NotFinite = "not_finite", 500;
    /// A page of the job's pixels is gone with the node that held it. Never final: the job is delivered and prepared again.
    PageLost = "page_lost", 503;
    /// Nothing is free to take the job; try again later.
    Overloaded = "overloaded", 503;
}

/// An error as a publisher sees it: a stable code and a sentence that says what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{} ({}): {message}", code.as_str(), code.number())]
pub struct JobError {
    /// Stable code.
    pub code: ErrorCode,
    /// The code's number, for readers that sort by HTTP's classes.
    pub number: u16,
    /// What is wrong and what to change; safe to show.
    pub message: String,
}

impl JobError {
    /// An error of `code` with a sentence for the publisher.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, number: code.number(), message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_stable_in_json() {
        let mut seen = std::collections::HashSet::new();
        for &code in ErrorCode::ALL {
            assert!(seen.insert(code.as_str()));
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{}\"", code.as_str()));
            assert!((400..600).contains(&code.number()));
        }
    }
}
