//! JetStream's request protocol as far as hot paths need it: publish acknowledgements, direct reads, statuses, errors.
//! (ADR-1 and ADR-31 of the NATS architecture repository; error numbers from nats-server's errors.json.)

use std::future::Future;
use std::time::Duration;

use async_nats::{HeaderMap, Message, PublishErrorKind};
use bytes::Bytes;
use serde::Deserialize;

use crate::Bus;
use crate::errors::BusError;

/// The message on the subject is not the expected one.
pub(crate) const WRONG_LAST_SEQUENCE: u32 = 10_071;
/// A discard-new stream has reached a limit.
const STREAM_LIMIT: u32 = 10_077;
/// The server's or account's storage is used up.
const NO_STORAGE: [u32; 3] = [10_023, 10_047, 10_002];
/// A publisher should not come back faster than this to a full stream.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What a stored message looks like to a direct read.
pub(crate) struct Stored {
    pub sequence: u64,
    pub payload: Bytes,
}

#[derive(Deserialize)]
struct PubAck {
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
    error: Option<ApiError>,
}

/// JetStream's error object.
#[derive(Debug, Deserialize)]
pub(crate) struct ApiError {
    #[serde(default)]
    pub code: u16,
    #[serde(default)]
    pub err_code: u32,
    #[serde(default)]
    pub description: String,
}

/// A stored publish: its sequence, and whether the stream had it already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ack {
    pub sequence: u64,
    pub duplicate: bool,
}

impl Bus {
    /// One request, one reply, within `timeout`, whatever the connection does.
    pub(crate) async fn ask_one(
        &self,
        operation: &'static str,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Message, BusError> {
        self.check_size(operation, headers.as_ref(), &payload)?;
        let message = self
            .within(operation, timeout, async {
                let mut replies = self.inner.inbox.ask(subject, headers, payload, 1).await?;
                replies.next().await.ok_or(BusError::Closed)
            })
            .await?;
        match status(&message) {
            503 => Err(BusError::NoResponders { operation }),
            _ => Ok(message),
        }
    }

    /// Publishes to a stream and waits for its acknowledgement.
    pub(crate) async fn store(
        &self,
        operation: &'static str,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<Ack, BusError> {
        let reply = self.ask_one(operation, subject, headers, payload, self.inner.request_timeout).await?;
        let ack: PubAck = parse(operation, &reply.payload)?;
        match ack.error {
            Some(error) => Err(error.into_bus(operation)),
            None => Ok(Ack { sequence: ack.seq, duplicate: ack.duplicate }),
        }
    }

    /// Last message of a subject, by direct get.
    pub(crate) async fn last_stored(&self, stream: &str, subject: &str) -> Result<Option<Stored>, BusError> {
        let subject = format!("$JS.API.DIRECT.GET.{stream}.{subject}");
        self.direct(subject, Bytes::new()).await
    }

    /// First message of a subject at or after `sequence`, by direct get.
    pub(crate) async fn next_stored(
        &self,
        stream: &str,
        subject: &str,
        sequence: u64,
    ) -> Result<Option<Stored>, BusError> {
        let request = serde_json::json!({ "seq": sequence, "next_by_subj": subject }).to_string();
        self.direct(format!("$JS.API.DIRECT.GET.{stream}"), request.into()).await
    }

    async fn direct(&self, subject: String, request: Bytes) -> Result<Option<Stored>, BusError> {
        const OPERATION: &str = "direct get";
        let reply = self.ask_one(OPERATION, subject, None, request, self.inner.request_timeout).await?;
        match status(&reply) {
            404 => Ok(None),
            0 => stored(reply).map(Some),
            code => Err(status_error(OPERATION, code, &reply)),
        }
    }

    /// Runs a call under a time limit, and counts it if it runs out.
    pub(crate) async fn within<T>(
        &self,
        operation: &'static str,
        after: Duration,
        call: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        match tokio::time::timeout(after, call).await {
            Ok(result) => result,
            Err(_elapsed) => {
                self.inner.events.count_timeout();
                Err(BusError::Timeout { operation, after })
            }
        }
    }

    /// Refuses what the server would close the connection for.
    pub(crate) fn check_size(
        &self,
        operation: &'static str,
        headers: Option<&HeaderMap>,
        payload: &Bytes,
    ) -> Result<(), BusError> {
        let header_bytes: usize = headers.map_or(0, |headers| {
            headers
                .iter()
                .map(|(name, values)| {
                    values
                        .iter()
                        .map(|value| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4)
                        .sum::<usize>()
                })
                .sum::<usize>()
                + 12
        });
        let (bytes, limit) = (payload.len() + header_bytes, self.inner.client.max_payload());
        if bytes <= limit {
            return Ok(());
        }
        Err(BusError::TooLarge {
            what: operation.to_string(),
            bytes: bytes as u64,
            limit_bytes: limit as u64,
            limit_key: "the NATS server's max_payload",
        })
    }
}

impl ApiError {
    /// The bus error for this JetStream error.
    pub(crate) fn into_bus(self, operation: &'static str) -> BusError {
        let Self { code, err_code, description: message } = self;
        if err_code == STREAM_LIMIT || NO_STORAGE.contains(&err_code) {
            return BusError::Overloaded { what: operation.to_string(), message, retry_after: RETRY_AFTER };
        }
        BusError::Api { operation, code, err_code, message }
    }
}

/// The status line of a reply, 0 if it has none.
pub(crate) fn status(message: &Message) -> u16 {
    message.status.map_or(0, |status| status.as_u16())
}

/// The error for a status that was not expected.
pub(crate) fn status_error(operation: &'static str, code: u16, message: &Message) -> BusError {
    BusError::Api { operation, code, err_code: 0, message: message.description.clone().unwrap_or_default() }
}

/// Reads a direct get's reply.
pub(crate) fn stored(message: Message) -> Result<Stored, BusError> {
    let sequence = header(&message, "Nats-Sequence").and_then(|text| text.parse().ok());
    let sequence = sequence.ok_or_else(|| BusError::Malformed {
        what: "direct get".into(),
        message: "a reply without Nats-Sequence".into(),
    })?;
    Ok(Stored { sequence, payload: message.payload })
}

/// A header's last value.
pub(crate) fn header<'a>(message: &'a Message, name: &str) -> Option<&'a str> {
    message.headers.as_ref()?.get_last(name).map(async_nats::HeaderValue::as_str)
}

/// Reads a JSON reply.
pub(crate) fn parse<'a, T: Deserialize<'a>>(operation: &'static str, payload: &'a [u8]) -> Result<T, BusError> {
    serde_json::from_slice(payload)
        .map_err(|error| BusError::Malformed { what: operation.to_string(), message: error.to_string() })
}

/// The client refused to send.
pub(crate) fn publish_error(error: &async_nats::PublishError) -> BusError {
    match error.kind() {
        PublishErrorKind::Send => BusError::Closed,
        _ => BusError::Malformed { what: "publish".into(), message: error.to_string() },
    }
}
