//! The outputs of all jobs as they are stored from now on, by one reader: what a measurement needs, where a reader for each
//! job would be measured as well.

use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::Ordered;
use futures::StreamExt;
use millrace_protocol::OutputChunk;

use crate::Bus;
use crate::errors::BusError;
use crate::follow::ordered_outputs;

/// All outputs, chunk by chunk. Dropping it ends the subscription.
pub struct Watch {
    source: Box<Ordered>,
}

impl Bus {
    /// Watches every job's output; what is stored from the return of this call on is seen.
    ///
    /// # Errors
    /// If the output stream cannot be read now.
    pub async fn watch_outputs(&self) -> Result<Watch, BusError> {
        let all = self.inner.subjects.out_all();
        Ok(Watch { source: Box::new(ordered_outputs(self, all, DeliverPolicy::New).await?) })
    }
}

impl Watch {
    /// The next chunk.
    ///
    /// # Errors
    /// A reader that broke off (there is no reconnecting: a measurement with a hole is none), or a message that is no chunk.
    pub async fn next(&mut self) -> Result<OutputChunk, BusError> {
        let broken = |message: String| BusError::Api { operation: "watch outputs", code: 500, err_code: 0, message };
        let message = self.source.next().await.ok_or_else(|| broken("the subscription ended".into()))?;
        let message = message.map_err(|error| broken(error.to_string()))?;
        serde_json::from_slice(&message.payload).map_err(|error| BusError::Malformed {
            what: format!("output on {}", message.subject),
            message: error.to_string(),
        })
    }
}
