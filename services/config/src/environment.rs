//! The environment as a value. The only place in the workspace that reads it.

use std::ffi::OsString;
use std::path::PathBuf;

/// Everything that is taken from the environment; a set variable wins over the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// `MILLRACE_CONFIG`: path of the TOML file.
    pub config_path: Option<PathBuf>,
    /// `MILLRACE_NATS_URL`: `[nats] url`.
    pub nats_url: Option<String>,
    /// `MILLRACE_NATS_SERVER`: `[nats] server_path`.
    pub nats_server: Option<PathBuf>,
    /// `MILLRACE_NATS_STORE_DIR`: `[nats] store_dir`.
    pub nats_store_dir: Option<PathBuf>,
    /// `MILLRACE_DEVICE`: `[executor] device`.
    pub device: Option<String>,
    /// `MILLRACE_LISTEN`: `[telemetry] listen`.
    pub listen: Option<String>,
    /// `MILLRACE_LOG`: `[telemetry] log_filter`.
    pub log_filter: Option<String>,
    /// `MILLRACE_LOG_FORMAT`: `[telemetry] log_format`.
    pub log_format: Option<String>,
    /// `XDG_STATE_HOME`, else `HOME/.local/state`: base of folders that are left empty in the file.
    pub state_home: Option<PathBuf>,
}

impl Environment {
    /// Reads the process's environment. Unset and empty variables count as absent.
    pub fn read() -> Self {
        Self::from_lookup(|name| std::env::var_os(name))
    }

    /// Takes variables from `lookup`.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Self {
        let raw = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let path = |name: &str| raw(name).map(PathBuf::from);
        let text = |name: &str| raw(name).map(|value| value.to_string_lossy().into_owned());
        Self {
            config_path: path("MILLRACE_CONFIG"),
            nats_url: text("MILLRACE_NATS_URL"),
            nats_server: path("MILLRACE_NATS_SERVER"),
            nats_store_dir: path("MILLRACE_NATS_STORE_DIR"),
            device: text("MILLRACE_DEVICE"),
            listen: text("MILLRACE_LISTEN"),
            log_filter: text("MILLRACE_LOG"),
            log_format: text("MILLRACE_LOG_FORMAT"),
            state_home: path("XDG_STATE_HOME").or_else(|| path("HOME").map(|home| home.join(".local/state"))),
        }
    }

    /// A folder of this service for data that survives a restart.
    pub(crate) fn state_dir(&self, name: &str) -> PathBuf {
        let base = self.state_home.clone().unwrap_or_else(|| PathBuf::from("/tmp"));
        base.join("millrace").join(name)
    }
}
