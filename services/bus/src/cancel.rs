//! Cancellation: a tombstone for jobs that have not started or are delivered again, and a broadcast for those that run.

use bytes::Bytes;
use millrace_protocol::JobId;

use crate::Bus;
use crate::errors::BusError;

impl Bus {
    /// Cancels a job: stores its tombstone, then tells every scheduler. A job that has ended is not changed.
    ///
    /// # Errors
    /// As [`Bus::publish_job`]; if the tombstone is stored and the broadcast fails, the job still ends at its next claim.
    pub async fn cancel(&self, job: &JobId) -> Result<(), BusError> {
        let body = serde_json::json!({ "cancelled_unix_ms": self.inner.clock.unix_ms() }).to_string();
        self.store("cancel job", self.tombstone(job), None, Bytes::from(body)).await?;
        self.publish(&self.inner.subjects.cancel(job), Bytes::new()).await
    }

    /// Whether a job has a tombstone.
    ///
    /// # Errors
    /// [`BusError::Timeout`], [`BusError::NoResponders`].
    pub async fn is_cancelled(&self, job: &JobId) -> Result<bool, BusError> {
        let stream = format!("KV_{}", self.inner.subjects.cancel_bucket());
        Ok(self.last_stored(&stream, &self.tombstone(job)).await?.is_some())
    }

    /// Key-value entries are messages on this subject (ADR-8).
    fn tombstone(&self, job: &JobId) -> String {
        format!("$KV.{}.{job}", self.inner.subjects.cancel_bucket())
    }
}
