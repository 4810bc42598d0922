//! Following a job's output as it is stored, from any sequence on, across reconnects, until its final message.

use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::{Ordered, OrderedConfig};
use futures::StreamExt;
use millrace_protocol::{Chunk, JobId, OutputChunk};
use millrace_runtime::{Backoff, BackoffPolicy};

use crate::Bus;
use crate::errors::BusError;
use crate::output::decode;

const RETRY: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(50),
    longest: Duration::from_secs(2),
    healthy_after: Duration::from_secs(10),
};

/// A job's output, message by message. Dropping it ends the subscription.
pub struct Follow {
    bus: Bus,
    job: JobId,
    next_seq: u64,
    source: Option<Box<Ordered>>,
    backoff: Backoff,
    ended: bool,
}

impl Bus {
    /// Follows a job's output from sequence `from_seq` on (0 or 1: from its start).
    ///
    /// # Errors
    /// If the output stream cannot be read now.
    pub async fn follow(&self, job: &JobId, from_seq: u64) -> Result<Follow, BusError> {
        let mut follow = Follow {
            bus: self.clone(),
            job: job.clone(),
            next_seq: from_seq.max(1),
            source: None,
            backoff: Backoff::new(RETRY),
            ended: false,
        };
        follow.source = Some(Box::new(follow.open().await?));
        Ok(follow)
    }
}

impl Follow {
    /// The next message and its sequence; `None` after the final one. Reconnects for ever: put a time limit around it.
    ///
    /// # Errors
    /// [`BusError::Malformed`] for a message that is no chunk (it is skipped by the next call).
    pub async fn next(&mut self) -> Option<Result<(u64, OutputChunk), BusError>> {
        while !self.ended {
            let Some(source) = self.source.as_mut() else {
                tokio::time::sleep(self.backoff.next_delay()).await;
                match self.open().await {
                    Ok(source) => self.source = Some(Box::new(source)),
                    Err(error) => tracing::debug!(job = %self.job, %error, "output cannot be read now"),
                }
                continue;
            };
            let message = match source.next().await {
                Some(Ok(message)) => message,
                failed => {
                    tracing::debug!(job = %self.job, error = ?failed.map(|f| f.err()), "output reader starts again");
                    self.source = None;
                    continue;
                }
            };
            self.backoff.reset();
            let Ok(info) = message.info() else { continue };
            let sequence = info.stream_sequence;
            if sequence < self.next_seq {
                continue;
            }
            self.next_seq = sequence + 1;
            let chunk = decode(&self.job, &message.payload);
            self.ended = chunk.as_ref().is_ok_and(|chunk| matches!(chunk.chunk, Chunk::Final(_)));
            return Some(chunk.map(|chunk| (sequence, chunk)));
        }
        None
    }

    async fn open(&self) -> Result<Ordered, BusError> {
        let from = DeliverPolicy::ByStartSequence { start_sequence: self.next_seq };
        ordered_outputs(&self.bus, self.bus.inner.subjects.out(&self.job), from).await
    }
}

/// An ordered reader of the output stream.
pub(crate) async fn ordered_outputs(
    bus: &Bus,
    filter_subject: String,
    deliver_policy: DeliverPolicy,
) -> Result<Ordered, BusError> {
    const OPERATION: &str = "follow output";
    let inner = &bus.inner;
    let config = OrderedConfig { filter_subject, deliver_policy, ..OrderedConfig::default() };
    let stream = inner.subjects.out_stream();
    bus.within(OPERATION, inner.request_timeout, async {
        let unreadable = |message: String| BusError::Api { operation: OPERATION, code: 500, err_code: 0, message };
        let consumer = inner
            .jetstream
            .create_consumer_on_stream(config, stream)
            .await
            .map_err(|error| unreadable(error.to_string()))?;
        consumer.messages().await.map_err(|error| unreadable(error.to_string()))
    })
    .await
}
