//! The job document: one JSON object that any service can publish.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::content::Message;
use crate::ids::{JobId, ModelName};
use crate::sampling::Sampling;

/// Service class: decides which consumer pulls the job and whether chunks are published per step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// A person waits.
    #[default]
    Interactive,
    /// Nobody waits; throughput counts.
    Batch,
    /// A window of a live stream; stale ones are worth nothing.
    Stream,
}

impl Class {
    /// Every class.
    pub const ALL: [Class; 3] = [Class::Interactive, Class::Batch, Class::Stream];

    /// The class's subject token and metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Interactive => "interactive",
            Class::Batch => "batch",
            Class::Stream => "stream",
        }
    }

    /// Reads a subject token.
    pub fn from_token(token: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.as_str() == token)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Highest priority a job can ask for; 0 is the lowest.
pub const MAX_PRIORITY: u8 = 9;

/// A job. Exactly one of `messages`, `prompt` and `prompt_token_ids` is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    /// Identity and idempotency key. Must equal the subject's last token; absent, that token counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<JobId>,
    /// Model name. Must equal the subject's; absent, the subject's counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    /// Conversation, rendered by the checkpoint's chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// Text that is tokenised as it is, no template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Token ids that are used as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Tools offered to the model, as the chat template expects them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<serde_json::Value>,
    /// Further variables for the chat template (`enable_thinking`, ...).
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub template_args: serde_json::Map<String, serde_json::Value>,
    /// How tokens are chosen.
    #[serde(default)]
    pub sampling: Sampling,
    /// Most tokens to generate; absent: the checkpoint's `max_new_tokens`, else what fits, capped by `scheduler.default_max_tokens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Texts that end the answer; they are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Token ids that end the answer, beside the checkpoint's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop_token_ids: Vec<u32>,
    /// Go on past the checkpoint's end-of-text tokens (for measurements).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ignore_eos: bool,
    /// 0 (lowest) to 9; higher ones preempt lower ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// Latest useful moment of the answer, in milliseconds since 1970 (UTC).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_unix_ms: Option<u64>,
    /// One chunk per step (true, default) or only the final one.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub stream: bool,
    /// Whose share of the engine this job uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Anything; repeated in the final message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<serde_json::Value>,
}

fn yes() -> bool {
    true
}

fn is_true(value: &bool) -> bool {
    *value
}

impl Default for JobRequest {
    fn default() -> Self {
        Self {
            id: None,
            model: None,
            messages: None,
            prompt: None,
            prompt_token_ids: None,
            tools: None,
            template_args: serde_json::Map::new(),
            sampling: Sampling::default(),
            max_tokens: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            priority: None,
            deadline_unix_ms: None,
            stream: true,
            tenant: None,
            metadata: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_job_is_a_prompt() {
        let job: JobRequest = serde_json::from_str(r#"{"prompt":"Hi"}"#).unwrap();
        assert!(job.stream);
        assert_eq!(serde_json::to_string(&job).unwrap(), r#"{"prompt":"Hi","sampling":{}}"#);
    }

    #[test]
    fn unknown_keys_are_named() {
        let error = serde_json::from_str::<JobRequest>(r#"{"prompt":"Hi","max_token":3}"#).unwrap_err();
        assert!(error.to_string().contains("max_token"), "{error}");
    }
}
