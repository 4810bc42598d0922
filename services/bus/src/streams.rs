//! The five streams: what they are, created once or only verified. Buckets are streams by another name (ADR-8, ADR-20).

use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType};
use bytes::Bytes;
use millrace_config::{Storage, StreamMode};
use millrace_runtime::{Backoff, BackoffPolicy};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Bus;
use crate::api::{ApiError, parse};
use crate::errors::BusError;

const STREAM_NOT_FOUND: u32 = 10_059;
const STREAM_NAME_IN_USE: u32 = 10_058;
const CONSUMER_NOT_FOUND: u32 = 10_014;
const CONSUMER_EXISTS: u32 = 10_148;
/// Room for headers beside the document in a job message.
const HEADER_ROOM_BYTES: u64 = 64 << 10;
/// Cancellations are a name and a time each.
const CANCEL_MAX_BYTES: u64 = 64 << 20;
/// The server's default window; only JOBS needs a longer one.
const SHORT_WINDOW: Duration = Duration::from_secs(120);
/// Tries while JetStream starts or elects a leader.
const TRIES: u32 = 8;
const RETRY: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(50),
    longest: Duration::from_secs(2),
    healthy_after: Duration::from_secs(10),
};

/// One differing field.
struct Difference {
    field: &'static str,
    wanted: String,
    found: String,
}

impl Bus {
    /// Creates what is missing and brings what differs in line (`[streams] mode = "create"`), or only compares.
    /// Any number of processes may do this at once.
    ///
    /// # Errors
    /// [`BusError::Missing`] or [`BusError::Mismatch`] in verify mode, or when a field cannot be changed any more.
    pub async fn ensure_streams(&self) -> Result<(), BusError> {
        for wanted in self.wanted_streams()? {
            self.ensure_stream(&wanted).await?;
        }
        self.ensure_consumers().await
    }

    fn wanted_streams(&self) -> Result<Vec<Config>, BusError> {
        let (subjects, limits) = (&self.inner.subjects, &self.inner.streams);
        let base = Config {
            storage: storage_type(limits.storage),
            num_replicas: limits.replicas,
            retention: RetentionPolicy::Limits,
            max_messages: -1,
            max_messages_per_subject: -1,
            max_message_size: -1,
            max_consumers: -1,
            allow_direct: true,
            duplicate_window: SHORT_WINDOW,
            ..Config::default()
        };
        let jobs = Config {
            name: subjects.jobs_stream(),
            description: Some("Jobs that wait or run; acknowledged when their final message is stored".into()),
            subjects: vec![subjects.jobs_all()],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            max_bytes: signed(limits.jobs_max_bytes),
            max_messages: signed(limits.jobs_max_messages),
            max_message_size: i32::try_from(limits.job_max_bytes.saturating_add(HEADER_ROOM_BYTES)).unwrap_or(i32::MAX),
            duplicate_window: limits.duplicate_window,
            ..base.clone()
        };
        let out = Config {
            name: subjects.out_stream(),
            description: Some("Claims, deltas and one final message per job".into()),
            subjects: vec![subjects.out_all()],
            discard: DiscardPolicy::Old,
            max_bytes: signed(limits.out_max_bytes),
            max_age: limits.out_max_age,
            duplicate_window: SHORT_WINDOW.min(limits.out_max_age),
            ..base.clone()
        };
        let dead_letters = Config {
            name: subjects.dead_letter_stream(),
            description: Some("Jobs that ended for a reason worth a look".into()),
            subjects: vec![subjects.dead_letters_all()],
            discard: DiscardPolicy::Old,
            max_bytes: signed(limits.dlq_max_bytes),
            max_age: limits.dlq_max_age,
            duplicate_window: SHORT_WINDOW.min(limits.dlq_max_age),
            ..base.clone()
        };
        let bucket = subjects.media_bucket();
        let media = Config {
            name: format!("OBJ_{bucket}"),
            description: Some("Media too large for a message".into()),
            subjects: vec![format!("$O.{bucket}.C.>"), format!("$O.{bucket}.M.>")],
            discard: DiscardPolicy::New,
            max_bytes: signed(limits.media_max_bytes),
            max_age: limits.media_max_age,
            duplicate_window: SHORT_WINDOW.min(limits.media_max_age),
            allow_rollup: true,
            ..base.clone()
        };
        let bucket = subjects.cancel_bucket();
        let cancelled = Config {
            name: format!("KV_{bucket}"),
            description: Some("Tombstones of cancelled jobs".into()),
            subjects: vec![format!("$KV.{bucket}.>")],
            discard: DiscardPolicy::New,
            max_bytes: signed(CANCEL_MAX_BYTES),
            max_messages_per_subject: 1,
            max_age: limits.cancel_max_age,
            duplicate_window: SHORT_WINDOW.min(limits.cancel_max_age),
            allow_rollup: true,
            deny_delete: true,
            ..base
        };
        Ok(vec![jobs, out, dead_letters, media, cancelled])
    }

    async fn ensure_stream(&self, wanted: &Config) -> Result<(), BusError> {
        let name = &wanted.name;
        let found: Info = match self.query("stream info", format!("$JS.API.STREAM.INFO.{name}")).await {
            Ok(found) => found,
            Err(error) if has_code(&error, STREAM_NOT_FOUND) => {
                if self.inner.streams.mode == StreamMode::Verify {
                    return Err(BusError::Missing { object: format!("stream {name}") });
                }
                match self.admin::<Info>("stream create", format!("$JS.API.STREAM.CREATE.{name}"), wanted).await {
                    Ok(created) => created,
                    // Another process was faster: what it made is judged like anything found.
                    Err(error) if has_code(&error, STREAM_NAME_IN_USE) => {
                        self.query("stream info", format!("$JS.API.STREAM.INFO.{name}")).await?
                    }
                    Err(BusError::Overloaded { message, .. }) => return Err(self.too_small(wanted, &message)),
                    Err(error) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        };
        let differences = stream_differences(wanted, &found.config);
        let Some(first) = differences.first() else { return Ok(()) };
        if self.inner.streams.mode == StreamMode::Verify {
            return Err(first.error(format!("stream {name}")));
        }
        for Difference { field, wanted, found } in &differences {
            tracing::warn!(stream = %name, field, %found, %wanted, "changing a stream to what the configuration says");
        }
        // Fields that are not ours (placement, metadata, sources) stay as they were set.
        let changed = Config {
            subjects: wanted.subjects.clone(),
            max_bytes: wanted.max_bytes,
            max_messages: wanted.max_messages,
            max_messages_per_subject: wanted.max_messages_per_subject,
            max_message_size: wanted.max_message_size,
            max_age: wanted.max_age,
            discard: wanted.discard,
            duplicate_window: wanted.duplicate_window,
            allow_direct: wanted.allow_direct,
            num_replicas: wanted.num_replicas,
            ..found.config
        };
        let updated: Info = self.admin("stream update", format!("$JS.API.STREAM.UPDATE.{name}"), &changed).await?;
        match stream_differences(wanted, &updated.config).first() {
            Some(left) => Err(left.error(format!("stream {name}"))),
            None => Ok(()),
        }
    }

    fn too_small(&self, wanted: &Config, message: &str) -> BusError {
        let (name, bytes) = (&wanted.name, wanted.max_bytes);
        let reason =
            format!("{name} with {bytes} bytes does not fit its storage ({message}); lower the limits in [streams]");
        BusError::Unsuitable { url: self.url().to_string(), reason }
    }

    /// Asks JetStream's administration for something.
    pub(crate) async fn query<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        subject: String,
    ) -> Result<T, BusError> {
        self.admin_request(operation, subject, Bytes::new()).await
    }

    /// Has JetStream's administration do something.
    pub(crate) async fn admin<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        subject: String,
        request: &impl Serialize,
    ) -> Result<T, BusError> {
        let body = serde_json::to_vec(request)
            .map_err(|error| BusError::Malformed { what: operation.into(), message: error.to_string() })?;
        self.admin_request(operation, subject, body.into()).await
    }

    /// One request, repeated while no leader answers.
    async fn admin_request<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        subject: String,
        body: Bytes,
    ) -> Result<T, BusError> {
        #[derive(Deserialize)]
        struct MaybeError {
            error: Option<ApiError>,
        }
        let mut backoff = Backoff::new(RETRY);
        loop {
            let timeout = self.inner.request_timeout;
            match self.ask_one(operation, subject.clone(), None, body.clone(), timeout).await {
                Err(BusError::NoResponders { .. }) if backoff.tries() < TRIES => {
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                Err(error) => return Err(error),
                Ok(reply) => {
                    return match parse::<MaybeError>(operation, &reply.payload)?.error {
                        Some(error) => Err(error.into_bus(operation)),
                        None => parse(operation, &reply.payload),
                    };
                }
            }
        }
    }
}

impl Difference {
    fn error(&self, object: String) -> BusError {
        BusError::Mismatch { object, field: self.field, wanted: self.wanted.clone(), found: self.found.clone() }
    }
}

/// The error for a consumer's first difference.
pub(crate) fn mismatch(object: String, field: &'static str, wanted: String, found: String) -> BusError {
    Difference { field, wanted, found }.error(object)
}

/// Whether JetStream refused with this `err_code`.
pub(crate) fn has_code(error: &BusError, wanted: u32) -> bool {
    matches!(error, BusError::Api { err_code, .. } if *err_code == wanted)
}

/// Whether a consumer does not exist.
pub(crate) fn consumer_missing(error: &BusError) -> bool {
    has_code(error, CONSUMER_NOT_FOUND)
}

/// Whether a strict create lost a race.
pub(crate) fn consumer_exists(error: &BusError) -> bool {
    has_code(error, CONSUMER_EXISTS)
}

fn stream_differences(wanted: &Config, found: &Config) -> Vec<Difference> {
    let mut differences = Vec::new();
    let mut compare = |field, wanted: String, found: String| {
        if wanted != found {
            differences.push(Difference { field, wanted, found });
        }
    };
    compare("subjects", format!("{:?}", wanted.subjects), format!("{:?}", found.subjects));
    compare("retention", format!("{:?}", wanted.retention), format!("{:?}", found.retention));
    compare("storage", format!("{:?}", wanted.storage), format!("{:?}", found.storage));
    compare("num_replicas", wanted.num_replicas.to_string(), found.num_replicas.to_string());
    compare("discard", format!("{:?}", wanted.discard), format!("{:?}", found.discard));
    compare("max_bytes", wanted.max_bytes.to_string(), found.max_bytes.to_string());
    compare("max_msgs", wanted.max_messages.to_string(), found.max_messages.to_string());
    compare(
        "max_msgs_per_subject",
        wanted.max_messages_per_subject.to_string(),
        found.max_messages_per_subject.to_string(),
    );
    compare("max_msg_size", wanted.max_message_size.to_string(), found.max_message_size.to_string());
    compare("max_age", format!("{:?}", wanted.max_age), format!("{:?}", found.max_age));
    compare("duplicate_window", format!("{:?}", wanted.duplicate_window), format!("{:?}", found.duplicate_window));
    compare("allow_direct", wanted.allow_direct.to_string(), found.allow_direct.to_string());
    differences
}

fn storage_type(storage: Storage) -> StorageType {
    match storage {
        Storage::File => StorageType::File,
        Storage::Memory => StorageType::Memory,
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
