//! The connection: which server, how it reconnects, and the handle that everything else hangs on.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::{Client, ConnectOptions};
use millrace_config::{Nats, NatsUrl, Streams};
use millrace_protocol::subjects::Subjects;
use millrace_runtime::{BackoffPolicy, Clock};

use crate::errors::BusError;
use crate::events::BusEvents;
use crate::inbox::Inbox;
use crate::managed::{self, ManagedOptions, ManagedServer};

/// Messages the client library buffers for one subscription before it drops; ours drain into bounded queues at once.
const CLIENT_BUFFER_MESSAGES: usize = 16_384;
/// Longest wait for one connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Where a server of this machine is looked for.
const LOCAL_URL: &str = "nats://127.0.0.1:4222";
/// Waits between reconnects.
const RECONNECT: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(50),
    longest: Duration::from_secs(2),
    healthy_after: Duration::from_secs(10),
};

/// A connection to NATS. Cloning is cheap and shares it; no call holds a lock across a wait.
#[derive(Clone)]
pub struct Bus {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) client: Client,
    pub(crate) jetstream: jetstream::Context,
    pub(crate) inbox: Inbox,
    pub(crate) subjects: Subjects,
    pub(crate) streams: Streams,
    pub(crate) events: BusEvents,
    pub(crate) clock: Clock,
    pub(crate) request_timeout: Duration,
    url: String,
    server: Option<ManagedServer>,
}

impl Bus {
    /// Connects as `[nats]` says, and starts a managed server if it says so (or finds none fit to use). Streams are not
    /// touched: see [`Bus::ensure_streams`]. `name` is what the server's monitoring shows.
    ///
    /// # Errors
    /// [`BusError::Connect`], [`BusError::Unsuitable`], [`BusError::ServerMissing`], [`BusError::ServerStart`].
    pub async fn connect(nats: &Nats, streams: &Streams, name: &str, clock: Clock) -> Result<Self, BusError> {
        let events = BusEvents::default();
        let (client, url, server) = match &nats.url {
            NatsUrl::Url(url) => (open(nats, url, name, &events).await?, url.clone(), None),
            NatsUrl::Managed => managed_client(nats, name, &events).await?,
            NatsUrl::Auto => match running_server(nats, name, &events).await {
                Some((client, url)) => (client, url, None),
                None => managed_client(nats, name, &events).await?,
            },
        };
        suitable(&client, &url)?;
        Self::over(client, (url, server), events, nats, streams, clock).await
    }

    /// Another connection to the same server, for traffic that must not stand in the way of this one's. Ends before this one.
    ///
    /// # Errors
    /// [`BusError::Connect`].
    pub async fn beside(&self, nats: &Nats, name: &str) -> Result<Self, BusError> {
        let Inner { url, streams, clock, .. } = &*self.inner;
        let events = BusEvents::default();
        let client = open(nats, url, name, &events).await?;
        Self::over(client, (url.clone(), None), events, nats, streams, clock.clone()).await
    }

    async fn over(
        client: Client,
        (url, server): (String, Option<ManagedServer>),
        events: BusEvents,
        nats: &Nats,
        streams: &Streams,
        clock: Clock,
    ) -> Result<Self, BusError> {
        let subjects = Subjects::new(&nats.prefix)
            .map_err(|e| BusError::Malformed { what: "[nats] prefix".into(), message: e.to_string() })?;
        let inbox = Inbox::open(client.clone(), events.clone()).await?;
        let jetstream = jetstream::ContextBuilder::new()
            .timeout(nats.request_timeout)
            .ack_timeout(nats.request_timeout)
            .build(client.clone());
        let inner = Inner {
            client,
            jetstream,
            inbox,
            subjects,
            streams: streams.clone(),
            events,
            clock,
            request_timeout: nats.request_timeout,
            url,
            server,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The subject grammar under the configured prefix.
    pub fn subjects(&self) -> &Subjects {
        &self.inner.subjects
    }

    /// Address of the server.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// Counters of the connection.
    pub fn events(&self) -> &BusEvents {
        &self.inner.events
    }

    /// Whether the connection stands now.
    pub fn is_connected(&self) -> bool {
        self.inner.client.connection_state() == async_nats::connection::State::Connected
    }

    /// Largest message the server takes, headers included, in bytes.
    pub fn max_payload_bytes(&self) -> usize {
        self.inner.client.max_payload()
    }

    /// Requests that wait for an answer now.
    pub fn requests_waiting(&self) -> usize {
        self.inner.inbox.waiting()
    }

    /// The server this process started, if it did.
    pub fn managed_server(&self) -> Option<&ManagedServer> {
        self.inner.server.as_ref()
    }

    /// From now on the connection's end is no fault: its user is about to go, and perhaps the server before it.
    pub fn expect_end(&self) {
        self.inner.events.closing();
    }

    /// Sends what is buffered, closes the connection, and stops the managed server if this process started one.
    /// Clones of the bus are of no use afterwards.
    pub async fn shutdown(&self) {
        let flush = self.within("flush", self.inner.request_timeout, async {
            self.inner.client.flush().await.map_err(|_| BusError::Closed)
        });
        if let Err(error) = flush.await {
            tracing::warn!(%error, "what was buffered for NATS may be lost");
        }
        self.expect_end();
        let drain = self.within("drain", self.inner.request_timeout, async {
            self.inner.client.drain().await.map_err(|_| BusError::Closed)
        });
        if let Err(error) = drain.await {
            tracing::debug!(%error, "NATS connection did not drain");
        }
        if let Some(server) = &self.inner.server {
            server.stop().await;
        }
    }
}

async fn managed_client(
    nats: &Nats,
    name: &str,
    events: &BusEvents,
) -> Result<(Client, String, Option<ManagedServer>), BusError> {
    let server = ManagedServer::start(&ManagedOptions::from_config(nats)).await?;
    let url = server.url().to_string();
    let client = open(nats, &url, name, events).await?;
    Ok((client, url, Some(server)))
}

/// A server that already runs on this machine: the one an earlier process manages in the same folder, else the default port.
async fn running_server(nats: &Nats, name: &str, events: &BusEvents) -> Option<(Client, String)> {
    let candidates = managed::recorded_url(&nats.store_dir).into_iter().chain([LOCAL_URL.to_string()]);
    for url in candidates {
        // Its events count only if it is used.
        let tried = BusEvents::default();
        let Ok(client) = open(nats, &url, name, &tried).await else { continue };
        match suitable(&client, &url) {
            Ok(()) => {
                drop(client);
                if let Ok(client) = open(nats, &url, name, events).await {
                    return Some((client, url));
                }
            }
            Err(error) => tracing::warn!(%error, "not using the NATS server that runs here"),
        }
    }
    None
}

async fn open(nats: &Nats, url: &str, name: &str, events: &BusEvents) -> Result<Client, BusError> {
    let refused = |message: String| BusError::Connect { url: url.to_string(), message };
    let observer = events.clone();
    let mut options = ConnectOptions::new()
        .name(name)
        .connection_timeout(CONNECT_TIMEOUT)
        .request_timeout(Some(nats.request_timeout))
        .subscription_capacity(CLIENT_BUFFER_MESSAGES)
        .ping_interval(Duration::from_secs(10))
        .reconnect_delay_callback(|attempts| millrace_runtime::Backoff::delay_after(RECONNECT, attempts))
        .event_callback(move |event| {
            observer.observe(&event);
            std::future::ready(())
        });
    if let Some(credentials) = &nats.credentials {
        options = options
            .credentials_file(credentials)
            .await
            .map_err(|e| refused(format!("[nats] credentials {}: {e}", credentials.display())))?;
    }
    match tokio::time::timeout(CONNECT_TIMEOUT, options.connect(url)).await {
        Ok(connected) => connected.map_err(|error| refused(error.to_string())),
        Err(_elapsed) => Err(refused("no answer".into())),
    }
}

/// Checks what this service builds on.
fn suitable(client: &Client, url: &str) -> Result<(), BusError> {
    let info = client.server_info();
    let unsuitable = |reason: String| BusError::Unsuitable { url: url.to_string(), reason };
    if !info.jetstream {
        return Err(unsuitable("JetStream is off; start it with `nats-server -js`".into()));
    }
    if !managed::new_enough(&info.version) {
        return Err(unsuitable(format!(
            "it is version {}, and work queues are safe from {} on",
            info.version,
            managed::MIN_VERSION_TEXT
        )));
    }
    Ok(())
}
