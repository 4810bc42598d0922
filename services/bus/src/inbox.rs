//! Requests through one subscription of our own: a table of waiting calls, each removed when its call ends for any
//! reason. (async-nats' own table keeps an entry for every request that was never answered.)

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::{Client, HeaderMap, Message};
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api;
use crate::errors::BusError;
use crate::events::BusEvents;

/// Replies that may wait for one call; more are dropped and counted.
const REPLIES_PER_CALL: usize = 1_024;

/// The inbox of one connection.
pub(crate) struct Inbox {
    shared: Arc<Shared>,
    router: JoinHandle<()>,
}

struct Shared {
    client: Client,
    prefix: String,
    events: BusEvents,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, mpsc::Sender<Message>>>,
}

/// Replies of one request. Dropping it forgets the request.
pub(crate) struct Replies {
    token: u64,
    shared: Arc<Shared>,
    receiver: mpsc::Receiver<Message>,
}

impl Inbox {
    /// Subscribes the inbox.
    pub(crate) async fn open(client: Client, events: BusEvents) -> Result<Self, BusError> {
        let prefix = client.new_inbox();
        let mut subscriber = client.subscribe(format!("{prefix}.*")).await.map_err(|_| BusError::Closed)?;
        let (next, waiting) = (AtomicU64::new(0), Mutex::default());
        let shared = Arc::new(Shared { client, prefix, events, next, waiting });
        let router = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Some(message) = subscriber.next().await {
                    shared.route(message);
                }
            }
        });
        Ok(Self { shared, router })
    }

    /// Sends a request and returns its replies, at most `replies` of them buffered. The caller sets the time limit.
    pub(crate) async fn ask(
        &self,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
        replies: usize,
    ) -> Result<Replies, BusError> {
        let shared = &self.shared;
        let token = shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel(replies.clamp(1, REPLIES_PER_CALL));
        shared.table().insert(token, sender);
        let replies = Replies { token, shared: Arc::clone(shared), receiver };
        let reply_to = format!("{}.{token}", shared.prefix);
        let sent = match headers {
            Some(headers) => shared.client.publish_with_reply_and_headers(subject, reply_to, headers, payload).await,
            None => shared.client.publish_with_reply(subject, reply_to, payload).await,
        };
        sent.map_err(|error| api::publish_error(&error))?;
        Ok(replies)
    }

    /// Calls that wait for a reply now.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.table().len()
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.router.abort();
    }
}

impl Replies {
    /// The next reply; `None` only if the connection closed.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        self.receiver.recv().await
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.shared.table().remove(&self.token);
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Message>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn route(&self, message: Message) {
        let token = message.subject.rsplit('.').next().and_then(|token| token.parse::<u64>().ok());
        // A late reply finds no entry, and nobody who wants it.
        let Some(sender) = token.and_then(|token| self.table().get(&token).cloned()) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = sender.try_send(message) {
            self.events.count_dropped();
        }
    }
}
