//! Media that a job refers to by name, read from the object bucket.

use bytes::Bytes;
use millrace_bus::{Bus, BusError};
use millrace_protocol::{ErrorCode, JobError};

use crate::source::MediaFetch;

/// Reads objects over the bus.
pub struct BusMedia {
    /// Connection.
    pub bus: Bus,
}

impl MediaFetch for BusMedia {
    async fn object(&self, name: &str, most_bytes: u64) -> Result<Bytes, JobError> {
        self.bus.object_get(name, most_bytes).await.map_err(|error| {
            let code = match &error {
                BusError::ObjectMissing { .. } => ErrorCode::MediaMissing,
                BusError::TooLarge { .. } => ErrorCode::TooLarge,
                _ => ErrorCode::Internal,
            };
            JobError::new(code, error.to_string())
        })
    }
}
