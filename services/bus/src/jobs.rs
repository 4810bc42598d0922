//! The work queue: publishing jobs, pulling them, and answering for them through their ack subjects.

use std::time::Duration;

use async_nats::{HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use millrace_protocol::ready::Delivery;
use millrace_protocol::{Class, JobId, ModelName};

use crate::Bus;
use crate::api::{self, status};
use crate::consumers::consumer_name;
use crate::core::{Headers, headers};
use crate::errors::BusError;

const OPERATION: &str = "pull jobs";
/// Most jobs of one pull.
const MAX_PULL: usize = 256;
/// Shortest wait of a pull: time for the server to look and answer.
const LEAST_EXPIRES: Duration = Duration::from_millis(20);
/// Longest silence between two jobs of one pull.
const LINGER: Duration = Duration::from_millis(25);

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
    async fn return_orphan(&self, ack_subject: &str) {
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
        let mut pull = Pull::open(&self.bus).await?;
        pull.run(&self.next_subject, max, expires.max(LEAST_EXPIRES)).await?;
        Ok(std::mem::take(&mut pull.jobs))
    }
}

/// One pull under way. Deliveries carry the job's subject and not the inbox's, so each pull has its own subscription.
/// If it is dropped before it returned, the jobs it holds or that are on their way go back to the queue.
struct Pull<'a> {
    bus: &'a Bus,
    inbox: String,
    /// Present while the server may still deliver.
    subscriber: Option<Subscriber>,
    jobs: Vec<JobDelivery>,
}

impl<'a> Pull<'a> {
    async fn open(bus: &'a Bus) -> Result<Self, BusError> {
        let inbox = bus.inner.client.new_inbox();
        let subscriber = bus.within(OPERATION, bus.inner.request_timeout, async {
            bus.inner.client.subscribe(inbox.clone()).await.map_err(|_| BusError::Closed)
        });
        let subscriber = Some(subscriber.await?);
        Ok(Self { bus, inbox, subscriber, jobs: Vec::new() })
    }

    /// Asks once. `no_wait` with `expires`: the server waits for the first job and ends the pull as soon as no more wait.
    async fn run(&mut self, next_subject: &str, max: usize, expires: Duration) -> Result<(), BusError> {
        let Self { bus, inbox, subscriber, jobs } = self;
        let Some(subscriber) = subscriber.as_mut() else { return Err(BusError::Closed) };
        let request = serde_json::json!({ "batch": max, "no_wait": true, "expires": expires.as_nanos() }).to_string();
        let request_timeout = bus.inner.request_timeout;
        let client = &bus.inner.client;
        bus.within(OPERATION, request_timeout, async {
            let sent = client.publish_with_reply(next_subject.to_string(), inbox.clone(), request.into()).await;
            sent.map_err(|error| api::publish_error(&error))
        })
        .await?;
        // The server ends the pull itself; only a lost connection makes this longer limit count.
        let first = bus.within(OPERATION, expires + request_timeout, next(subscriber)).await?;
        let Some(first) = first else { return Ok(()) };
        jobs.push(first);
        while jobs.len() < max {
            match tokio::time::timeout(LINGER, next(subscriber)).await {
                Ok(Ok(Some(job))) => jobs.push(job),
                // What was received counts, whatever ended the pull.
                Ok(Ok(None) | Err(_)) => return Ok(()),
                // A consumer at its limit of unacknowledged jobs says nothing: stop here, and take what is on its way.
                Err(_elapsed) => {
                    let rest = bus.within(OPERATION, request_timeout, async {
                        subscriber.drain().await.map_err(|_| BusError::Closed)?;
                        while let Ok(Some(job)) = next(subscriber).await {
                            jobs.push(job);
                        }
                        Ok(())
                    });
                    return rest.await.or(Ok(()));
                }
            }
        }
        Ok(())
    }
}

/// The next job of a pull; `None` once the server ended it.
async fn next(subscriber: &mut Subscriber) -> Result<Option<JobDelivery>, BusError> {
    let message = subscriber.next().await.ok_or(BusError::Closed)?;
    match status(&message) {
        0 => delivery(message).map(Some),
        // 404: nothing waits. 408: the time is over, or no more wait.
        404 | 408 => Ok(None),
        503 => Err(BusError::NoResponders { operation: OPERATION }),
        code => Err(api::status_error(OPERATION, code, &message)),
    }
}

impl Drop for Pull<'_> {
    fn drop(&mut self) {
        let (bus, jobs) = (self.bus.clone(), std::mem::take(&mut self.jobs));
        let Some(mut subscriber) = self.subscriber.take() else { return };
        // Without a runtime the process is ending: the ack wait returns the jobs.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            for job in jobs {
                bus.return_orphan(&job.delivery.ack_subject).await;
            }
            // Tells the server that nobody waits here, and yields what it sent before it knew.
            if subscriber.drain().await.is_err() {
                return;
            }
            while let Some(message) = subscriber.next().await {
                if let Some(ack_subject) = message.reply.filter(|_| message.status.is_none()) {
                    bus.return_orphan(&ack_subject).await;
                }
            }
        });
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

fn delivery(message: Message) -> Result<JobDelivery, BusError> {
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
