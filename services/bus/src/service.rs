//! Discovery by NATS' own convention (ADR-32): each actor answers $SRV.PING, INFO and STATS; tools ask who is there.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use async_nats::service::{Service, ServiceExt};
use bytes::Bytes;
use serde::Deserialize;

use crate::Bus;
use crate::api::status;
use crate::errors::BusError;

/// Most services of one discovery.
const MAX_SERVICES: usize = 1_000;

/// A registered service. Dropping it leaves the registration until the process ends; stop it with [`ServiceHandle::stop`].
pub struct ServiceHandle {
    service: Service,
}

/// A service that answered.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ServiceInfo {
    /// Kind, such as `millrace-preprocess`.
    pub name: String,
    /// Instance.
    pub id: String,
    /// Semantic version.
    pub version: String,
    /// What the instance says about itself.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

impl Bus {
    /// Registers this process as an instance of `name` (`A-Z a-z 0-9 - _`), `version` in semver.
    ///
    /// # Errors
    /// [`BusError::Malformed`] for a name or version that the convention refuses.
    pub async fn register_service(
        &self,
        name: &str,
        version: &str,
        description: &str,
        metadata: BTreeMap<String, String>,
    ) -> Result<ServiceHandle, BusError> {
        let registered = self.within("register service", self.inner.request_timeout, async {
            let metadata: HashMap<String, String> = metadata.into_iter().collect();
            let builder = self.inner.client.service_builder().description(description).metadata(metadata);
            let service = builder.start(name, version).await;
            let refused =
                |error: async_nats::Error| BusError::Malformed { what: name.into(), message: error.to_string() };
            Ok(ServiceHandle { service: service.map_err(refused)? })
        });
        let handle = registered.await?;
        self.round_trip().await?;
        Ok(handle)
    }

    /// Everyone who answers `$SRV.INFO` within `timeout`, by name and id.
    ///
    /// # Errors
    /// [`BusError::Timeout`] while disconnected.
    pub async fn discover(&self, timeout: Duration) -> Result<Vec<ServiceInfo>, BusError> {
        const OPERATION: &str = "discover services";
        let asked = self.inner.inbox.ask("$SRV.INFO".into(), None, Bytes::new(), MAX_SERVICES);
        let mut replies = self.within(OPERATION, self.inner.request_timeout, asked).await?;
        let mut found: Vec<ServiceInfo> = Vec::new();
        // Nobody knows how many there are: the time limit ends the list.
        let _elapsed = tokio::time::timeout(timeout, async {
            while let Some(message) = replies.next().await {
                if status(&message) == 503 {
                    return;
                }
                match serde_json::from_slice(&message.payload) {
                    Ok(info) => found.push(info),
                    Err(error) => tracing::debug!(%error, "a service answers in a form of its own"),
                }
            }
        })
        .await;
        found.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        Ok(found)
    }
}

impl ServiceHandle {
    /// Instance id, as `discover` shows it.
    pub async fn id(&self) -> String {
        self.service.info().await.id
    }

    /// Takes the registration back.
    pub async fn stop(self) {
        if let Err(error) = self.service.stop().await {
            tracing::debug!(%error, "service registration did not stop");
        }
    }
}
