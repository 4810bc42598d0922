//! Core NATS: publish, subscribe, request, reply. Nothing here is stored; a message nobody hears is gone.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::Bus;
use crate::api::{header, publish_error};
use crate::errors::BusError;

/// Headers of a message; of repeated ones the last value.
pub type Headers = BTreeMap<String, String>;

const ERROR_TEXT: &str = "Nats-Service-Error";
const ERROR_CODE: &str = "Nats-Service-Error-Code";

/// A received message.
#[derive(Debug, Clone)]
pub struct Incoming {
    /// Where it was published.
    pub subject: String,
    /// Content.
    pub payload: Bytes,
    /// Where an answer is awaited.
    pub reply: Option<String>,
    /// Headers.
    pub headers: Headers,
}

/// Messages of one subject, in order. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Subscription {
    receiver: mpsc::Receiver<Incoming>,
    feeder: JoinHandle<()>,
}

impl Bus {
    /// Publishes without confirmation.
    ///
    /// # Errors
    /// [`BusError::TooLarge`], or [`BusError::Timeout`] while disconnected with a full buffer.
    pub async fn publish(&self, subject: &str, payload: Bytes) -> Result<(), BusError> {
        self.check_size("publish", None, &payload)?;
        self.within("publish", self.inner.request_timeout, async {
            self.inner.client.publish(subject.to_string(), payload).await.map_err(|e| publish_error(&e))
        })
        .await
    }

    /// Subscribes; at most `capacity` messages wait to be taken, newer ones are dropped and counted in
    /// [`crate::BusEvents::dropped`]. With a queue group each message goes to one member. Returns once the server knows
    /// the subscription.
    ///
    /// # Errors
    /// [`BusError::Timeout`] or [`BusError::Closed`].
    pub async fn subscribe(
        &self,
        subject: &str,
        capacity: usize,
        queue_group: Option<&str>,
    ) -> Result<Subscription, BusError> {
        let (client, timeout) = (&self.inner.client, self.inner.request_timeout);
        let mut subscriber = self
            .within("subscribe", timeout, async {
                let subscribed = match queue_group {
                    Some(group) => client.queue_subscribe(subject.to_string(), group.to_string()).await,
                    None => client.subscribe(subject.to_string()).await,
                };
                subscribed.map_err(|error| BusError::Malformed { what: subject.into(), message: error.to_string() })
            })
            .await?;
        let (sender, receiver) = mpsc::channel(capacity.max(1));
        let events = self.inner.events.clone();
        let feeder = tokio::spawn(async move {
            while let Some(message) = subscriber.next().await {
                match sender.try_send(Incoming::from(message)) {
                    Ok(()) => {}
                    Err(mpsc::error::TrySendError::Full(_)) => events.count_dropped(),
                    Err(mpsc::error::TrySendError::Closed(_)) => break,
                }
            }
        });
        let subscription = Subscription { receiver, feeder };
        self.round_trip().await?;
        Ok(subscription)
    }

    /// Asks whoever answers on `subject`.
    ///
    /// # Errors
    /// [`BusError::Service`] with the peer's error, [`BusError::NoResponders`], [`BusError::Timeout`],
    /// [`BusError::TooLarge`].
    pub async fn request(&self, subject: &str, payload: Bytes, timeout: Duration) -> Result<Bytes, BusError> {
        let reply = self.ask_one("request", subject.to_string(), None, payload, timeout).await?;
        match header(&reply, ERROR_CODE) {
            None => Ok(reply.payload),
            Some(code) => Err(BusError::Service {
                code: code.parse().unwrap_or(500),
                message: header(&reply, ERROR_TEXT).unwrap_or_default().to_string(),
            }),
        }
    }

    /// Answers a request. A message that awaits no answer is left alone.
    ///
    /// # Errors
    /// As [`Bus::publish`].
    pub async fn reply(&self, request: &Incoming, payload: Bytes) -> Result<(), BusError> {
        match &request.reply {
            Some(subject) => self.publish(subject, payload).await,
            None => Ok(()),
        }
    }

    /// Answers a request with an error (ADR-32: text and number in headers, empty body).
    ///
    /// # Errors
    /// As [`Bus::publish`].
    pub async fn reply_error(&self, request: &Incoming, code: u16, text: &str) -> Result<(), BusError> {
        let Some(subject) = request.reply.clone() else { return Ok(()) };
        let mut headers = HeaderMap::new();
        // Line ends would end the header.
        headers.insert(ERROR_TEXT, text.replace(['\r', '\n'], " "));
        headers.insert(ERROR_CODE, code.to_string());
        self.within("reply", self.inner.request_timeout, async {
            self.inner
                .client
                .publish_with_headers(subject, headers, Bytes::new())
                .await
                .map_err(|error| publish_error(&error))
        })
        .await
    }

    /// Waits until the server has handled everything sent before: it answers a request that nobody serves.
    pub(crate) async fn round_trip(&self) -> Result<(), BusError> {
        let subject = format!("{}.nobody", self.inner.client.new_inbox());
        match self.ask_one("round trip", subject, None, Bytes::new(), self.inner.request_timeout).await {
            Ok(_) | Err(BusError::NoResponders { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Subscription {
    /// The next message; `None` once the connection closed for good.
    pub async fn next(&mut self) -> Option<Incoming> {
        self.receiver.recv().await
    }

    /// The messages as a stream, for actors that take theirs that way.
    pub fn into_stream(self) -> impl Stream<Item = Incoming> {
        futures::stream::unfold(self, |mut subscription| async move {
            subscription.next().await.map(|incoming| (incoming, subscription))
        })
    }

    /// A message that waits already.
    pub fn try_next(&mut self) -> Option<Incoming> {
        self.receiver.try_recv().ok()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.feeder.abort();
    }
}

impl From<Message> for Incoming {
    fn from(message: Message) -> Self {
        Self {
            subject: message.subject.to_string(),
            reply: message.reply.map(|reply| reply.to_string()),
            headers: message.headers.as_ref().map(headers).unwrap_or_default(),
            payload: message.payload,
        }
    }
}

/// The client's headers as plain text.
pub(crate) fn headers(map: &HeaderMap) -> Headers {
    map.iter().filter_map(|(name, values)| Some((name.to_string(), values.last()?.as_str().to_string()))).collect()
}
