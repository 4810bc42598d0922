//! What the streams and consumers hold, for `millrace status` and for metrics.

use async_nats::jetstream::stream::Info;
use millrace_protocol::Class;

use crate::Bus;
use crate::consumers::consumer_name;
use crate::errors::BusError;

/// One stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamStatus {
    /// Name.
    pub name: String,
    /// Messages stored.
    pub messages: u64,
    /// Bytes stored.
    pub bytes: u64,
    /// Limit on bytes; `None` if there is none.
    pub max_bytes: Option<u64>,
    /// Sequence of the newest message ever stored.
    pub last_seq: u64,
}

/// One class's consumer of the work queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerStatus {
    /// Class.
    pub class: Class,
    /// Name.
    pub name: String,
    /// Jobs that wait for their first delivery.
    pub pending: u64,
    /// Jobs that are delivered and not ended.
    pub ack_pending: u64,
    /// Jobs that were delivered more than once and have not ended.
    pub redelivered: u64,
    /// Pulls that wait for jobs.
    pub waiting_pulls: u64,
}

impl Bus {
    /// All streams and buckets of this deployment.
    ///
    /// # Errors
    /// [`BusError::Api`] if one does not exist, [`BusError::Timeout`].
    pub async fn stream_status(&self) -> Result<Vec<StreamStatus>, BusError> {
        let subjects = &self.inner.subjects;
        let names = [
            subjects.jobs_stream(),
            subjects.out_stream(),
            subjects.dead_letter_stream(),
            format!("OBJ_{}", subjects.media_bucket()),
            format!("KV_{}", subjects.cancel_bucket()),
        ];
        let mut streams = Vec::with_capacity(names.len());
        for name in names {
            let info: Info = self.query("stream info", format!("$JS.API.STREAM.INFO.{name}")).await?;
            streams.push(StreamStatus {
                name,
                messages: info.state.messages,
                bytes: info.state.bytes,
                max_bytes: u64::try_from(info.config.max_bytes).ok(),
                last_seq: info.state.last_sequence,
            });
        }
        Ok(streams)
    }

    /// The work queue's consumers.
    ///
    /// # Errors
    /// As [`Bus::stream_status`].
    pub async fn consumer_status(&self) -> Result<Vec<ConsumerStatus>, BusError> {
        let mut consumers = Vec::with_capacity(Class::ALL.len());
        for class in Class::ALL {
            let info = self.consumer_info(class).await?;
            consumers.push(ConsumerStatus {
                class,
                name: consumer_name(class),
                pending: info.num_pending,
                ack_pending: info.num_ack_pending as u64,
                redelivered: info.num_redelivered as u64,
                waiting_pulls: info.num_waiting as u64,
            });
        }
        Ok(consumers)
    }
}
