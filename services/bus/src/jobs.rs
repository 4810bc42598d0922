//! The work queue: publishing jobs, asking for them, and answering for them through their ack subjects.

use std::time::Duration;

use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use millrace_protocol::ready::Delivery;
use millrace_protocol::{Class, JobId, ModelName};

use crate::Bus;
use crate::consumers::consumer_name;
use crate::core::{Headers, headers};
use crate::errors::BusError;
use crate::pull::Pull;

/// Most jobs of one pull.
const MAX_PULL: usize = 256;
/// Shortest wait of a pull: time for the server to look and answer.
const LEAST_EXPIRES: Duration = Duration::from_millis(20);

/// A job that the queue holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Its sequence in the work queue.
    pub seq: u64,
    /// The queue had a job of that id already, now or within the duplicate window; nothing was stored.
    pub duplicate: bool,
}

/// One delivery of a job. `Debug` prints sizes only.
#[derive(Clone)]
pub struct JobDelivery {
    /// Where it was published; see `Subjects::parse_job`.
    pub subject: String,
    /// The publisher's headers.
    pub headers: Headers,
    /// The job document.
    pub payload: Bytes,
    /// Who answers for it, and for which attempt.
    pub delivery: Delivery,
    /// When the queue stored it, in milliseconds since 1970 (the server's clock).
    pub published_unix_ms: u64,
}

/// Pulls the jobs of one class.
#[derive(Clone)]
pub struct JobConsumer {
    bus: Bus,
    class: Class,
    next_subject: String,
}

impl Bus {
    /// Stores a job. `body` is its JSON document.
    ///
    /// # Errors
    /// [`BusError::TooLarge`] before anything is sent, [`BusError::Overloaded`] if the queue is full (also for a
    /// duplicate: the limit is checked first), [`BusError::Timeout`] (publishing again is safe: the id is the key).
    pub async fn publish_job(
        &self,
        class: Class,
        model: &ModelName,
        job: &JobId,
        body: Bytes,
    ) -> Result<Published, BusError> {
        let limit_bytes = self.inner.streams.job_max_bytes;
        if body.len() as u64 > limit_bytes {
            return Err(BusError::TooLarge {
                what: format!("job {job}"),
                bytes: body.len() as u64,
                limit_bytes,
                limit_key: "[streams] job_max_bytes",
            });
        }
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", job.as_str());
        let subject = self.inner.subjects.job(class, model, job);
        let ack = self.store("publish job", subject, Some(headers), body).await?;
        Ok(Published { seq: ack.sequence, duplicate: ack.duplicate })
    }

    /// A puller for one class. [`Bus::ensure_streams`] must have run somewhere.
    pub fn job_consumer(&self, class: Class) -> JobConsumer {
        let stream = self.inner.subjects.jobs_stream();
        let next_subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{}", consumer_name(class));
        JobConsumer { bus: self.clone(), class, next_subject }
    }

    /// Extends a delivery by another ack wait. Send it every third of it.
    ///
    /// # Errors
    /// As [`Bus::publish`].
    pub async fn ack_progress(&self, ack_subject: &str) -> Result<(), BusError> {
        self.publish(ack_subject, Bytes::from_static(b"+WPI")).await
    }

    /// Ends a job for good and waits until the queue has forgotten it.
    ///
    /// JetStream takes this from any earlier holder of the job too: call it only after an append succeeded.
    ///
    /// # Errors
    /// [`BusError::Timeout`], [`BusError::NoResponders`].
    pub async fn ack_final(&self, ack_subject: &str) -> Result<(), BusError> {
        let ack = Bytes::from_static(b"+ACK");
        self.ask_one("acknowledge job", ack_subject.to_string(), None, ack, self.inner.request_timeout).await.map(drop)
    }

    /// Returns a job; it is delivered again after `delay`.
    ///
    /// # Errors
    /// As [`Bus::publish`].
    pub async fn nak(&self, ack_subject: &str, delay: Duration) -> Result<(), BusError> {
        let body = if delay.is_zero() {
            Bytes::from_static(b"-NAK")
        } else {
            Bytes::from(format!("-NAK {{\"delay\": {}}}", delay.as_nanos()))
        };
        self.publish(ack_subject, body).await
    }

    /// Removes a job without success; `reason` goes into the server's advisory.
    ///
    /// # Errors
    /// [`BusError::Timeout`], [`BusError::NoResponders`].
    pub async fn term(&self, ack_subject: &str, reason: &str) -> Result<(), BusError> {
        let body = Bytes::from(format!("+TERM {}", reason.replace(['\r', '\n'], " ")));
        self.ask_one("terminate job", ack_subject.to_string(), None, body, self.inner.request_timeout).await.map(drop)
    }

    /// Returns a job whose puller has gone. Best effort: the ack wait does the same later.
    pub(crate) async fn return_orphan(&self, ack_subject: &str) {
        self.inner.events.count_orphan();
        if let Err(error) = self.nak(ack_subject, Duration::ZERO).await {
            tracing::debug!(%error, "a job could not be returned");
        }
    }

    /// Keeps a copy of a job that was given up, under the label of its error.
    ///
    /// # Errors
    /// As [`Bus::publish_job`].
    pub async fn dead_letter(&self, label: &str, job: &str, reason: &str, body: Bytes) -> Result<u64, BusError> {
        let mut headers = HeaderMap::new();
        headers.insert("Millrace-Reason", reason.replace(['\r', '\n'], " "));
        let subject = self.inner.subjects.dead_letter(label, job);
        Ok(self.store("dead letter", subject, Some(headers), body).await?.sequence)
    }
}

impl JobConsumer {
    /// Class of the jobs.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Takes up to `max` waiting jobs; if none waits, waits up to `expires` (at least 20 ms) for one. Never more than
    /// `max`, and an empty list once the time is over. Jobs that arrive for a dropped call go back to the queue at once.
    ///
    /// # Errors
    /// [`BusError::NoResponders`] (stream or consumer gone, or a leader election), [`BusError::Timeout`] while
    /// disconnected, [`BusError::Api`].
    pub async fn pull(&self, max: usize, expires: Duration) -> Result<Vec<JobDelivery>, BusError> {
        if max == 0 {
            return Ok(Vec::new());
        }
        let max = max.min(MAX_PULL);
        let pull = Pull::open(&self.bus, max, expires.max(LEAST_EXPIRES)).await?;
        pull.run(&self.next_subject).await
    }
}

impl std::fmt::Debug for JobDelivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobDelivery")
            .field("subject", &self.subject)
            .field("payload_bytes", &self.payload.len())
            .field("job_seq", &self.delivery.job_seq)
            .field("attempt", &self.delivery.attempt)
            .finish_non_exhaustive()
    }
}

/// Reads a delivered job.
pub(crate) fn delivery(message: Message) -> Result<JobDelivery, BusError> {
    let malformed = |text: &str| BusError::Malformed { what: "job delivery".into(), message: text.to_string() };
    let ack_subject = message.reply.as_ref().map(ToString::to_string).ok_or_else(|| malformed("no ack subject"))?;
    let position = Position::parse(&ack_subject).ok_or_else(|| malformed(&ack_subject))?;
    Ok(JobDelivery {
        subject: message.subject.to_string(),
        headers: message.headers.as_ref().map(headers).unwrap_or_default(),
        payload: message.payload,
        delivery: Delivery { ack_subject, job_seq: position.stream_seq, attempt: position.attempt },
        published_unix_ms: position.unix_ms,
    })
}

/// When a job was stored in the work queue, milliseconds since 1970, by the subject that acknowledges it.
pub fn published_unix_ms(ack_subject: &str) -> Option<u64> {
    Position::parse(ack_subject).map(|position| position.unix_ms)
}

/// What an ack subject says (ADR-15): `$JS.ACK.[domain.account.]stream.consumer.delivered.stream_seq.consumer_seq.time.pending`.
struct Position {
    attempt: u32,
    stream_seq: u64,
    unix_ms: u64,
}

impl Position {
    fn parse(ack_subject: &str) -> Option<Self> {
        let tokens: Vec<&str> = ack_subject.split('.').collect();
        let first = match tokens.len() {
            9 => 4,
            11.. => 6,
            _ => return None,
        };
        Some(Self {
            attempt: tokens.get(first)?.parse().ok()?,
            stream_seq: tokens.get(first + 1)?.parse().ok()?,
            unix_ms: tokens.get(first + 3)?.parse::<u64>().ok()? / 1_000_000,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_ack_subjects_are_read() {
        let old = "$JS.ACK.JOBS.pre-batch.3.77.5.1700000000123456789.2";
        let new = "$JS.ACK.hub.ACCHASH.JOBS.pre-batch.3.77.5.1700000000123456789.2";
        for subject in [old, new] {
            let position = Position::parse(subject).expect(subject);
            assert_eq!(published_unix_ms(subject), Some(1_700_000_000_123));
            assert_eq!((position.attempt, position.stream_seq, position.unix_ms), (3, 77, 1_700_000_000_123));
        }
        for bad in ["", "$JS.ACK.a.b.1.2.3.4", "$JS.ACK.a.b.x.2.3.4.5"] {
            assert!(Position::parse(bad).is_none(), "{bad}");
        }
    }
}
