//! A job's output subject: fenced appends, and reads of what is stored.
//!
//! The fence is `Nats-Expected-Last-Subject-Sequence`: whoever knows the subject's last sequence may write the next
//! message, everyone else is refused (10071). A new owner's claim therefore shuts out every older owner.

use async_nats::HeaderMap;
use bytes::Bytes;
use millrace_protocol::{JobId, OutputChunk};

use crate::Bus;
use crate::api::{WRONG_LAST_SEQUENCE, header, status, status_error, stored};
use crate::errors::{AppendError, BusError};
use crate::streams::has_code;

/// Messages of one batched read.
const READ_BATCH: usize = 256;

impl Bus {
    /// Last message of a job's output and its sequence; `None` if nothing is stored.
    ///
    /// # Errors
    /// [`BusError::Timeout`], [`BusError::NoResponders`], [`BusError::Malformed`].
    pub async fn out_last(&self, job: &JobId) -> Result<Option<(u64, OutputChunk)>, BusError> {
        let subjects = &self.inner.subjects;
        let last = self.last_stored(&subjects.out_stream(), &subjects.out(job)).await?;
        last.map(|last| Ok((last.sequence, decode(job, &last.payload)?))).transpose()
    }

    /// All of a job's output that is stored, in order.
    ///
    /// # Errors
    /// As [`Bus::out_last`].
    pub async fn out_read(&self, job: &JobId) -> Result<Vec<(u64, OutputChunk)>, BusError> {
        let mut chunks: Vec<(u64, OutputChunk)> = Vec::new();
        loop {
            let next = chunks.last().map_or(1, |(sequence, _)| sequence + 1);
            let (batch, left) = self.out_batch(job, next).await?;
            let stuck = batch.is_empty();
            chunks.extend(batch);
            if left == 0 || stuck {
                return Ok(chunks);
            }
        }
    }

    /// Messages from `sequence` on, and how many there are beyond them (a batched direct get, ADR-31).
    async fn out_batch(&self, job: &JobId, sequence: u64) -> Result<(Vec<(u64, OutputChunk)>, u64), BusError> {
        const OPERATION: &str = "read output";
        let subjects = &self.inner.subjects;
        let request = serde_json::json!({
            "batch": READ_BATCH,
            "seq": sequence,
            "next_by_subj": subjects.out(job),
        });
        let subject = format!("$JS.API.DIRECT.GET.{}", subjects.out_stream());
        let body = Bytes::from(request.to_string());
        self.within(OPERATION, self.inner.request_timeout, async {
            let mut replies = self.inner.inbox.ask(subject, None, body, READ_BATCH + 1).await?;
            let mut chunks = Vec::new();
            loop {
                let message = replies.next().await.ok_or(BusError::Closed)?;
                match status(&message) {
                    0 => {
                        let message = stored(message)?;
                        chunks.push((message.sequence, decode(job, &message.payload)?));
                    }
                    // End of the batch; the header says what is left.
                    204 => {
                        let left = header(&message, "Nats-Num-Pending").and_then(|text| text.parse().ok());
                        return Ok((chunks, left.unwrap_or(0)));
                    }
                    404 => return Ok((chunks, 0)),
                    503 => return Err(BusError::NoResponders { operation: OPERATION }),
                    code => return Err(status_error(OPERATION, code, &message)),
                }
            }
        })
        .await
    }

    /// Appends a chunk behind the message of sequence `expected_last_seq` (0: the first one) and returns its sequence.
    ///
    /// After a timeout or a refusal the subject is read: if the message right behind the expected one is this very chunk,
    /// it had been stored and counts as such. That is exact, because any other owner starts with a claim of its own.
    ///
    /// # Errors
    /// [`AppendError::Stale`]: somebody else wrote; let go of the job. [`AppendError::Bus`]: not known to be stored, call
    /// again with the same arguments (or [`BusError::TooLarge`], which will not change).
    pub async fn append(&self, job: &JobId, expected_last_seq: u64, chunk: &OutputChunk) -> Result<u64, AppendError> {
        let payload = encode(chunk)?;
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Expected-Last-Subject-Sequence", expected_last_seq.to_string());
        let subject = self.inner.subjects.out(job);
        let refused = match self.store("append output", subject, Some(headers), payload.clone()).await {
            Ok(ack) => return Ok(ack.sequence),
            Err(error) => error,
        };
        let stale = has_code(&refused, WRONG_LAST_SEQUENCE);
        if !stale && !matches!(refused, BusError::Timeout { .. }) {
            return Err(refused.into());
        }
        let subjects = &self.inner.subjects;
        let behind = self.next_stored(&subjects.out_stream(), &subjects.out(job), expected_last_seq + 1).await?;
        match behind {
            Some(stored) if stored.payload == payload => Ok(stored.sequence),
            Some(_) => Err(AppendError::Stale),
            None if stale => Err(AppendError::Stale),
            None => Err(refused.into()),
        }
    }
}

fn encode(chunk: &OutputChunk) -> Result<Bytes, BusError> {
    serde_json::to_vec(chunk)
        .map(Bytes::from)
        .map_err(|error| BusError::Malformed { what: "output chunk".into(), message: error.to_string() })
}

pub(crate) fn decode(job: &JobId, payload: &[u8]) -> Result<OutputChunk, BusError> {
    serde_json::from_slice(payload)
        .map_err(|error| BusError::Malformed { what: format!("output of job {job}"), message: error.to_string() })
}
