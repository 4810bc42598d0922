//! What can go wrong on the bus, and what to do about it: try again, refuse the job, or give up.

use std::time::Duration;

/// What the caller should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The same call can succeed later: return the message and back off.
    Retry,
    /// This input will never pass: refuse it.
    Reject,
    /// The configuration or the environment is at fault: stop.
    Fatal,
}

/// A failed call.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BusError {
    /// No `nats-server` binary to start.
    #[error(
        "no nats-server found ({tried}): install version {} or later (`./tests/run.sh --only-tools` fetches it), set MILLRACE_NATS_SERVER or \
         [nats] server_path to the binary, or set [nats] url to a running server",
        crate::managed::MIN_VERSION_TEXT
    )]
    ServerMissing {
        /// Where it was looked for.
        tried: String,
    },
    /// The managed server could not be started.
    #[error("nats-server did not start: {message}")]
    ServerStart {
        /// Its own last words, or what the system said.
        message: String,
    },
    /// The server cannot be reached.
    #[error("cannot reach NATS at {url}: {message}")]
    Connect {
        /// Address tried.
        url: String,
        /// Why not.
        message: String,
    },
    /// The server can be reached and is not fit for this service.
    #[error("the NATS server at {url} cannot be used: {reason}")]
    Unsuitable {
        /// Address.
        url: String,
        /// What is missing.
        reason: String,
    },
    /// A stream, bucket or consumer exists and differs from the configuration.
    #[error("{object}: {field} is {found}, the configuration wants {wanted}")]
    Mismatch {
        /// Name of the stream or `stream/consumer`.
        object: String,
        /// Its differing field.
        field: &'static str,
        /// What it should be.
        wanted: String,
        /// What it is.
        found: String,
    },
    /// A stream, bucket or consumer is missing and may not be created (`[streams] mode = "verify"`).
    #[error("{object} does not exist and [streams] mode is \"verify\": create it, or set mode to \"create\"")]
    Missing {
        /// Its name.
        object: String,
    },
    /// No answer in time; the operation may still take effect.
    #[error("{operation}: no answer within {} ms", after.as_millis())]
    Timeout {
        /// What was asked.
        operation: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// Nobody listens: a dead peer, or JetStream in an election or restart.
    #[error("{operation}: nobody answers on that subject now")]
    NoResponders {
        /// What was asked.
        operation: &'static str,
    },
    /// Larger than allowed; nothing was sent.
    #[error("{what} has {bytes} bytes, more than {limit_key} = {limit_bytes} bytes")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
        /// Where the limit is set.
        limit_key: &'static str,
    },
    /// A stream or the server's storage is full.
    #[error("{what} is full: {message}")]
    Overloaded {
        /// Which stream.
        what: String,
        /// The server's words.
        message: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// No such object in the media bucket.
    #[error("no object `{name}` in the media bucket")]
    ObjectMissing {
        /// Name asked for.
        name: String,
    },
    /// The peer answered with an error.
    #[error("{message} (code {code})")]
    Service {
        /// Number in HTTP's sense.
        code: u16,
        /// The peer's words.
        message: String,
    },
    /// JetStream refused for another reason.
    #[error("{operation}: JetStream says {message} (code {code}, err_code {err_code})")]
    Api {
        /// What was asked.
        operation: &'static str,
        /// HTTP-like code.
        code: u16,
        /// JetStream's own code (`errors.json` of nats-server).
        err_code: u32,
        /// Its text.
        message: String,
    },
    /// A message that is not what its subject promises.
    #[error("{what}: {message}")]
    Malformed {
        /// Which message.
        what: String,
        /// What is wrong with it.
        message: String,
    },
    /// The connection was closed for good.
    #[error("the bus is closed")]
    Closed,
}

impl BusError {
    /// What the caller should do.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Connect { .. }
            | Self::Timeout { .. }
            | Self::NoResponders { .. }
            | Self::Overloaded { .. }
            | Self::Closed => Kind::Retry,
            Self::Service { code, .. } | Self::Api { code, .. } if *code >= 500 => Kind::Retry,
            // A pull that met a change of the consumer's leader, or too many other pulls.
            Self::Api { code: 409, .. } => Kind::Retry,
            Self::TooLarge { .. }
            | Self::ObjectMissing { .. }
            | Self::Service { .. }
            | Self::Api { .. }
            | Self::Malformed { .. } => Kind::Reject,
            Self::ServerMissing { .. }
            | Self::ServerStart { .. }
            | Self::Unsuitable { .. }
            | Self::Mismatch { .. }
            | Self::Missing { .. } => Kind::Fatal,
        }
    }

    /// Bounded metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::ServerMissing { .. } => "server_missing",
            Self::ServerStart { .. } => "server_start",
            Self::Connect { .. } => "connect",
            Self::Unsuitable { .. } => "unsuitable",
            Self::Mismatch { .. } => "mismatch",
            Self::Missing { .. } => "missing",
            Self::Timeout { .. } => "timeout",
            Self::NoResponders { .. } => "no_responders",
            Self::TooLarge { .. } => "too_large",
            Self::Overloaded { .. } => "overloaded",
            Self::ObjectMissing { .. } => "object_missing",
            Self::Service { .. } => "service",
            Self::Api { .. } => "api",
            Self::Malformed { .. } => "malformed",
            Self::Closed => "closed",
        }
    }
}

/// Why a chunk was not appended to a job's output.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// Another owner has written: this one must let go of the job at once, without acknowledging it.
    #[error("another owner has written to the job's output")]
    Stale,
    /// Not known to be stored. Calling again with the same arguments is safe: a chunk that arrived late is found.
    #[error(transparent)]
    Bus(#[from] BusError),
}
