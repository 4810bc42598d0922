//! One pull of jobs, from its request until no job can come of it. Must not lose a job that the server sent: one that
//! nobody takes goes back to the queue.

use std::time::Duration;

use async_nats::{Message, Subscriber};
use bytes::Bytes;
use futures::StreamExt;

use crate::Bus;
use crate::api::{self, status};
use crate::errors::BusError;
use crate::jobs::{JobDelivery, delivery};

const OPERATION: &str = "pull jobs";
/// Longest silence between two jobs of one pull.
const LINGER: Duration = Duration::from_millis(25);

/// One pull under way. Deliveries carry the job's subject and not the inbox's, so each pull has its own subscription.
/// If it is dropped before it returned, the jobs it holds or that are on their way go back to the queue.
pub(crate) struct Pull<'a> {
    bus: &'a Bus,
    expires: Duration,
    max: usize,
    /// Present while the server may still deliver.
    source: Option<Source>,
    jobs: Vec<JobDelivery>,
}

impl<'a> Pull<'a> {
    pub(crate) async fn open(bus: &'a Bus, max: usize, expires: Duration) -> Result<Self, BusError> {
        let inbox = bus.inner.client.new_inbox();
        let subscriber = bus.within(OPERATION, bus.inner.request_timeout, async {
            bus.inner.client.subscribe(inbox.clone()).await.map_err(|_| BusError::Closed)
        });
        let subscriber = subscriber.await?;
        // A pull brings as many messages as jobs were asked for, or fewer jobs and the word that it has ended.
        let source = Some(Source { inbox, subscriber, more_than_all: max as u64 + 1 });
        Ok(Self { bus, expires, max, source, jobs: Vec::new() })
    }

    /// Asks once. `no_wait` with `expires`: the server waits for the first job and ends the pull as soon as no more wait.
    pub(crate) async fn run(mut self, next_subject: &str) -> Result<Vec<JobDelivery>, BusError> {
        let (bus, request_timeout) = (self.bus, self.bus.inner.request_timeout);
        self.ask(next_subject).await?;
        // The server ends the pull itself; only a lost connection makes this longer limit count.
        bus.within(OPERATION, self.expires + request_timeout, self.next()).await?;
        while self.source.is_some() {
            match tokio::time::timeout(LINGER, self.next()).await {
                Ok(Ok(())) => {}
                // What was received counts, whatever ended the pull.
                Ok(Err(_)) => break,
                // A consumer at its limit of unacknowledged jobs says nothing: stop here, and take what is on its way.
                Err(_elapsed) => {
                    let rest = bus.within(OPERATION, request_timeout, self.rest()).await;
                    rest.unwrap_or_else(|error| tracing::debug!(%error, "a pull did not end in time"));
                    break;
                }
            }
        }
        Ok(std::mem::take(&mut self.jobs))
    }

    async fn ask(&self, next_subject: &str) -> Result<(), BusError> {
        let Some(source) = &self.source else { return Err(BusError::Closed) };
        let (batch, expires) = (self.max, self.expires.as_nanos());
        let request = serde_json::json!({ "batch": batch, "no_wait": true, "expires": expires }).to_string();
        let (subject, reply_to) = (next_subject.to_string(), source.inbox.clone());
        self.bus
            .within(OPERATION, self.bus.inner.request_timeout, async {
                let sent = self.bus.inner.client.publish_with_reply(subject, reply_to, request.into()).await;
                sent.map_err(|error| api::publish_error(&error))
            })
            .await
    }

    /// Takes the next job, or the word that the pull has ended.
    async fn next(&mut self) -> Result<(), BusError> {
        let Some(source) = self.source.as_mut() else { return Ok(()) };
        let message = source.subscriber.next().await.ok_or(BusError::Closed)?;
        if status(&message) == 0 {
            self.jobs.push(delivery(message)?);
            if self.jobs.len() == self.max {
                self.source = None;
            }
            return Ok(());
        }
        self.source = None;
        match status(&message) {
            // 404: nothing waits. 408: the time is over, or no more wait.
            404 | 408 => Ok(()),
            503 => Err(BusError::NoResponders { operation: OPERATION }),
            code => Err(api::status_error(OPERATION, code, &message)),
        }
    }

    /// Ends the pull and takes the jobs that are on their way.
    async fn rest(&mut self) -> Result<(), BusError> {
        let (bus, Some(source)) = (self.bus, self.source.as_mut()) else { return Ok(()) };
        source.end(bus).await?;
        while let Some(message) = source.next_job().await {
            self.jobs.push(delivery(message)?);
        }
        self.source = None;
        Ok(())
    }
}

impl Drop for Pull<'_> {
    fn drop(&mut self) {
        // Without a source nothing can come any more, and what came was returned to the caller.
        let Some(mut source) = self.source.take() else { return };
        let (bus, jobs) = (self.bus.clone(), std::mem::take(&mut self.jobs));
        // After this the server has ended the pull by itself.
        let limit = self.expires + bus.inner.request_timeout;
        // Without a runtime the process is ending: the ack wait returns the jobs.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            // The end comes first: a returned job must not come to this pull again.
            let ended = bus.within(OPERATION, bus.inner.request_timeout, source.end(&bus)).await;
            ended.unwrap_or_else(|error| tracing::debug!(%error, "a dropped pull goes on until its time is over"));
            for job in jobs {
                bus.return_orphan(&job.delivery.ack_subject).await;
            }
            let rest = async {
                while let Some(ack_subject) = source.next_job().await.and_then(|job| job.reply) {
                    bus.return_orphan(&ack_subject).await;
                }
            };
            // Runs out only if the connection was lost, and the fillers with it.
            let _ = tokio::time::timeout(limit, rest).await;
        });
    }
}

/// Where the messages of one pull arrive.
struct Source {
    inbox: String,
    subscriber: Subscriber,
    /// More messages than the server sends for the pull.
    more_than_all: u64,
}

impl Source {
    /// Ends the subscription so that both sides agree on its last message: every job the server counts as sent arrives,
    /// and every other one goes to another pull.
    ///
    /// An unsubscription alone loses jobs until their ack wait. The client forgets the subscription before the server
    /// knows (async-nats' `drain` does not wait for an answer), and the server may have chosen it for a job just before.
    /// Both sides count a limited subscription, though: so it is limited to more messages than the pull has, and filled
    /// up to that with empty ones.
    async fn end(&mut self, bus: &Bus) -> Result<(), BusError> {
        self.subscriber.unsubscribe_after(self.more_than_all).await.map_err(|_| BusError::Closed)?;
        for _ in 0..self.more_than_all {
            let sent = bus.inner.client.publish(self.inbox.clone(), Bytes::new()).await;
            sent.map_err(|error| api::publish_error(&error))?;
        }
        Ok(())
    }

    /// The next job after the end was asked for; `None` after the last.
    async fn next_job(&mut self) -> Option<Message> {
        loop {
            let message = self.subscriber.next().await?;
            // Fillers have no reply subject, and neither has the server's word that the pull has ended.
            if status(&message) == 0 && message.reply.is_some() {
                return Some(message);
            }
        }
    }
}
