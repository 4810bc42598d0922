//! Wire types of Millrace: everything that crosses a NATS subject, and the grammar of those subjects.
//!
//! Owns names, shapes, limits, error codes and the schema version. Must not know a runtime, a client
//! library or a device: it depends on serde (with its JSON and postcard formats) and schemars, so that
//! any process, test or generator can link it. One file per recipient or concept.

pub mod content;
pub mod engine;
pub mod error;
pub mod ids;
pub mod job;
pub mod output;
pub mod pages;
pub mod plan;
pub mod prefix;
pub mod ready;
pub mod sampling;
pub mod step;
pub mod subjects;

pub use content::{Content, Message, Part, Source};
pub use error::{ErrorCode, JobError};
pub use ids::{ActorId, BlockId, InvalidToken, JobId, ModelName, SlotId};
pub use job::{Class, JobRequest};
pub use output::{Chunk, Final, FinishReason, OutputChunk, Status, Usage};
pub use pages::{PageDtype, PageRef};
pub use sampling::Sampling;

/// Version of every JSON document and binary message here; subjects carry it as `v1`.
/// Within a version fields are only ever added, with a default.
pub const SCHEMA_VERSION: u32 = 1;
