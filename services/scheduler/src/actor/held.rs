//! One job that this scheduler holds, from acceptance until its log has ended. Must not plan or write.

use std::time::Duration;

use millrace_protocol::output::{Final, Timings};
use millrace_protocol::{FinishReason, JobError, Status, Usage};
use millrace_runtime::InFlight;
use tokio_util::task::AbortOnDropHandle;

use crate::emit::Emitter;
use crate::log::JobLog;
use crate::policy::SeqId;

/// A held job.
pub(super) struct Held {
    /// Its sequence in the policy; `None` once it has ended there.
    pub seq: Option<SeqId>,
    /// `None` if what was shown cannot be continued.
    pub emitter: Option<Emitter>,
    /// What goes to its output subject.
    pub log: JobLog,
    /// The task that writes it; dropping the job ends it.
    pub _writer: AbortOnDropHandle<()>,
    /// Tells the drain gate that work is in flight.
    pub _in_flight: Option<InFlight>,
    /// Sequence in the work queue.
    pub job_seq: u64,
    /// Newest attempt.
    pub attempt: u32,
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens that were cached.
    pub cached_tokens: usize,
    /// What preprocessing took.
    pub preprocess_ms: f64,
    /// The publisher's metadata.
    pub metadata_json: Option<String>,
    /// When it was accepted.
    pub accepted_at: Duration,
    /// Time between its publication and its acceptance.
    pub age: Duration,
    /// When the first plan held it.
    pub planned_at: Option<Duration>,
    /// When this owner's first token came.
    pub first_token_at: Option<Duration>,
    /// When the last token came.
    pub last_token_at: Option<Duration>,
    /// Answer tokens of earlier owners.
    pub resumed_tokens: usize,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Outcome {
    /// With an answer.
    Done {
        /// Why.
        reason: FinishReason,
        /// The stop text.
        stop: Option<String>,
        /// Drawn tokens that are not part of the answer.
        hidden_tokens: u32,
    },
    /// Without.
    Error(Status, JobError),
}

impl Held {
    /// Time since its publication: what its publisher sees, the wait in the work queue and preprocessing included.
    pub fn since_published(&self, now: Duration) -> Duration {
        self.age + now.saturating_sub(self.accepted_at)
    }

    /// The job's terminal message.
    pub fn last_message(&self, outcome: Outcome, now: Duration) -> Final {
        let since = |at: Option<Duration>| at.map_or(0.0, |at| millis(at.saturating_sub(self.accepted_at)));
        let tokens = self.emitter.as_ref().map_or(&[][..], Emitter::token_ids);
        let (status, finish_reason, stop, error, hidden) = match outcome {
            Outcome::Done { reason, stop, hidden_tokens } => (Status::Done, Some(reason), stop, None, hidden_tokens),
            Outcome::Error(status, error) => (status, None, None, Some(error), 0),
        };
        Final {
            status,
            finish_reason,
            stop,
            error,
            text: self.emitter.as_ref().map(|emitter| emitter.text().to_owned()).unwrap_or_default(),
            token_ids: tokens.to_vec(),
            logprobs: Vec::new(),
            usage: Usage {
                prompt_tokens: self.prompt_tokens as u64,
                cached_tokens: self.cached_tokens as u64,
                completion_tokens: tokens.len() as u64 + u64::from(hidden),
            },
            timings: Timings {
                preprocess_ms: self.preprocess_ms,
                queue_ms: since(self.planned_at),
                first_token_ms: since(self.first_token_at),
                total_ms: since(Some(now)),
            },
            metadata: self.metadata_json.as_deref().and_then(|text| serde_json::from_str(text).ok()),
        }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
