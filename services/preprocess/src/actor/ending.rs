//! Ending a job in preprocessing: its only terminal message is stored, then the work queue forgets it.

use std::time::Duration;

use millrace_bus::{AppendError, Bus};
use millrace_protocol::ready::{Delivery, Shown};
use millrace_protocol::{Chunk, ErrorCode, Final, JobError, JobId, OutputChunk, SCHEMA_VERSION, Status, Usage};
use millrace_runtime::{Backoff, BackoffPolicy};

use crate::metrics::PreprocessMetrics;

/// Waits between tries while NATS is away. The delivery's heartbeat goes on meanwhile.
const RETRY: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
    healthy_after: Duration::from_secs(30),
};

/// Stores terminal messages.
#[derive(Clone)]
pub struct Ending {
    /// Connection.
    pub bus: Bus,
    /// Metrics.
    pub metrics: PreprocessMetrics,
}

/// A job that ends here.
#[derive(Debug)]
pub struct Ended<'a> {
    /// The job.
    pub job: &'a JobId,
    /// Its delivery.
    pub delivery: &'a Delivery,
    /// What earlier owners have shown.
    pub shown: &'a Shown,
    /// The publisher's metadata.
    pub metadata: Option<serde_json::Value>,
    /// Why.
    pub error: JobError,
}

/// The status that an error leads to.
pub fn status_of(code: ErrorCode) -> Status {
    match code {
        ErrorCode::Cancelled => Status::Cancelled,
        ErrorCode::DeadlineExceeded => Status::Expired,
        ErrorCode::Poison | ErrorCode::Internal | ErrorCode::NotFinite | ErrorCode::Overloaded => Status::Failed,
        _ => Status::Rejected,
    }
}

impl Ending {
    /// Stores the final message and acknowledges the delivery. Returns once that is done, or once it is certain that
    /// another owner answers for the job.
    pub async fn end(&self, ended: Ended<'_>) {
        let status = status_of(ended.error.code);
        let code = ended.error.code;
        tracing::info!(job = %ended.job, status = status.as_str(), error = %ended.error, "job ended in preprocessing");
        let chunk = final_chunk(&ended, status);
        let mut backoff = Backoff::new(RETRY);
        loop {
            match self.bus.append(ended.job, ended.shown.last_seq, &chunk).await {
                Ok(_) => break,
                Err(AppendError::Stale) => {
                    self.metrics.settled.with_label_values(&["other_owner"]).inc();
                    return;
                }
                Err(AppendError::Bus(error)) => {
                    tracing::warn!(job = %ended.job, %error, "final message not stored yet");
                    tokio::time::sleep(backoff.next_delay()).await;
                }
            }
        }
        self.metrics.finished.with_label_values(&[status.as_str()]).inc();
        self.metrics.errors.with_label_values(&[code.as_str()]).inc();
        self.acknowledge(ended.delivery).await;
    }

    /// Acknowledges a delivery whose terminal message is stored. If that fails it is delivered once more, found to have
    /// ended, and acknowledged then.
    pub async fn acknowledge(&self, delivery: &Delivery) {
        if let Err(error) = self.bus.ack_final(&delivery.ack_subject).await {
            tracing::warn!(%error, "acknowledgement not confirmed; the delivery will come again");
        }
    }
}

fn final_chunk(ended: &Ended<'_>, status: Status) -> OutputChunk {
    let shown = ended.shown;
    let last = Final {
        error: Some(ended.error.clone()),
        text: shown.text.clone(),
        token_ids: shown.token_ids.clone(),
        usage: Usage { completion_tokens: shown.token_ids.len() as u64, ..Usage::default() },
        metadata: ended.metadata.clone(),
        ..Final::bare(status)
    };
    OutputChunk {
        v: SCHEMA_VERSION,
        job: ended.job.clone(),
        index: shown.token_ids.len() as u64,
        chunk: Chunk::Final(Box::new(last)),
    }
}
