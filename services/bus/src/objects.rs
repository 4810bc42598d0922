//! The media bucket: the claim check for anything larger than a message.

use std::time::Duration;

use async_nats::jetstream::object_store::{GetErrorKind, ObjectMetadata, ObjectStore};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::Bus;
use crate::errors::BusError;

/// Bytes of one chunk: just below the default message limit, which halves the time of the default 128 KiB.
const CHUNK_BYTES: usize = 1_000 << 10;
/// Longest transfer of one object.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(300);

impl Bus {
    /// Stores an object under a name, in place of an older one. Returns its size in bytes.
    ///
    /// # Errors
    /// [`BusError::Overloaded`] if the bucket is full, [`BusError::Timeout`].
    pub async fn object_put(&self, name: &str, mut content: impl AsyncRead + Unpin) -> Result<u64, BusError> {
        const OPERATION: &str = "store object";
        let store = self.media().await?;
        let metadata =
            ObjectMetadata { name: name.to_string(), chunk_size: Some(CHUNK_BYTES), ..ObjectMetadata::default() };
        self.within(OPERATION, TRANSFER_TIMEOUT, async {
            let info = store.put(metadata, &mut content).await.map_err(|error| put_error(OPERATION, &error))?;
            Ok(info.size as u64)
        })
        .await
    }

    /// Reads an object of at most `max_bytes`; its digest is checked.
    ///
    /// # Errors
    /// [`BusError::ObjectMissing`], [`BusError::TooLarge`] before anything is read, [`BusError::Timeout`].
    pub async fn object_get(&self, name: &str, max_bytes: u64) -> Result<Bytes, BusError> {
        const OPERATION: &str = "read object";
        let store = self.media().await?;
        self.within(OPERATION, TRANSFER_TIMEOUT, async {
            let object = store.get(name).await.map_err(|error| match error.kind() {
                GetErrorKind::NotFound => BusError::ObjectMissing { name: name.to_string() },
                _ => unreadable(OPERATION, &error),
            })?;
            let bytes = object.info().size as u64;
            if bytes > max_bytes {
                return Err(BusError::TooLarge {
                    what: format!("object `{name}`"),
                    bytes,
                    limit_bytes: max_bytes,
                    limit_key: "the limit for this kind of media",
                });
            }
            let mut content = Vec::with_capacity(object.info().size);
            let read = object.take(max_bytes.saturating_add(1)).read_to_end(&mut content).await;
            read.map_err(|error| BusError::Malformed { what: format!("object `{name}`"), message: error.to_string() })?;
            Ok(Bytes::from(content))
        })
        .await
    }

    /// Removes an object; one that does not exist is fine.
    ///
    /// # Errors
    /// [`BusError::Timeout`].
    pub async fn object_delete(&self, name: &str) -> Result<(), BusError> {
        const OPERATION: &str = "delete object";
        use async_nats::jetstream::object_store::DeleteErrorKind;
        let store = self.media().await?;
        self.within(OPERATION, self.inner.request_timeout, async {
            match store.delete(name).await {
                Ok(()) => Ok(()),
                Err(error) if error.kind() == DeleteErrorKind::NotFound => Ok(()),
                Err(error) => Err(unreadable(OPERATION, &error)),
            }
        })
        .await
    }

    async fn media(&self) -> Result<ObjectStore, BusError> {
        const OPERATION: &str = "open media bucket";
        self.within(OPERATION, self.inner.request_timeout, async {
            let bucket = self.inner.subjects.media_bucket();
            let opened = self.inner.jetstream.get_object_store(bucket).await;
            opened.map_err(|error| unreadable(OPERATION, &error))
        })
        .await
    }
}

fn unreadable(operation: &'static str, error: &impl std::fmt::Display) -> BusError {
    BusError::Api { operation, code: 500, err_code: 0, message: error.to_string() }
}

fn put_error(operation: &'static str, error: &impl std::error::Error) -> BusError {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        message = format!("{message}: {inner}");
        source = inner.source();
    }
    // The client wraps JetStream's error in text only.
    let full = ["10077", "10047", "10023", "maximum bytes exceeded"].iter().any(|sign| message.contains(sign));
    if full {
        return BusError::Overloaded { what: operation.into(), message, retry_after: Duration::from_secs(10) };
    }
    BusError::Api { operation, code: 500, err_code: 0, message }
}
