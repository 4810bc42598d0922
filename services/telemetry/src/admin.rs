//! The admin endpoint: /metrics for Prometheus, /livez and /healthz (this process answers), /readyz (it can work).
//! Must not know what the conditions or families mean.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::{Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::TelemetryError;
use crate::health::Health;

/// A running admin endpoint; dropping it closes the endpoint.
#[derive(Debug)]
pub struct AdminServer {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Shared {
    registry: Registry,
    health: Health,
}

impl AdminServer {
    /// Listens on `address` (port 0: a free one) and serves until it is shut down or dropped.
    ///
    /// # Errors
    /// [`TelemetryError::Listen`] if the address cannot be had.
    pub async fn start(address: SocketAddr, registry: Registry, health: Health) -> Result<Self, TelemetryError> {
        let refused = |source| TelemetryError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        let routes = Router::new()
            .route("/metrics", get(metrics))
            .route("/livez", get(alive))
            .route("/healthz", get(alive))
            .route("/readyz", get(ready))
            .with_state(Shared { registry, health });
        let (stop, mut stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let ended = async move {
                // An error means that the handle was dropped: the same wish.
                let _ = stopped.wait_for(|stop| *stop).await;
            };
            if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(ended).await {
                tracing::error!(%error, "admin endpoint ended");
            }
        });
        Ok(Self { address, stop, task })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops listening and waits for open requests.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        let _ = self.task.await;
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    match TextEncoder::new().encode_to_string(&shared.registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn alive() -> &'static str {
    "ok\n"
}

async fn ready(State(shared): State<Shared>) -> Response {
    let conditions = shared.health.snapshot();
    let ready = conditions.values().all(Option::is_none);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({ "ready": ready, "conditions": conditions }).to_string();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}
