//! `pipeline.toml` and the environment: read as written, validated as a whole, handed out as plain values.
//!
//! Owns every key's name, default and check. Must not open any file but the TOML, and is the only crate that reads
//! environment variables.

pub mod environment;
pub mod error;
pub mod raw;
pub mod sections;
pub mod units;
mod validate;

use std::path::{Path, PathBuf};

pub use environment::Environment;
pub use error::{ConfigError, Invalid};
pub use sections::{
    Config, DeviceChoice, Drain, Dtype, Executor, LogFormat, MediaLimits, Model, Nats, NatsUrl, Pager, PatchForm,
    Preprocess, Scheduler, Storage, StreamMode, Streams, Telemetry, VideoPrompt,
};

/// Read when neither a path nor `MILLRACE_CONFIG` is given and it exists.
pub const DEFAULT_FILE: &str = "pipeline.toml";

impl Config {
    /// Reads the file at `path`, else the one `MILLRACE_CONFIG` names, else `pipeline.toml` in the working directory, else
    /// takes the defaults; then applies the environment and validates.
    ///
    /// # Errors
    /// [`ConfigError`]: unreadable file, TOML that does not follow the schema, or every invalid value with its key.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        Self::load_with(path, &Environment::read())
    }

    /// [`Config::load`] with the environment as a value.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_with(path: Option<&Path>, environment: &Environment) -> Result<Self, ConfigError> {
        let named = path.map(Path::to_path_buf).or_else(|| environment.config_path.clone());
        let file = named.or_else(|| Path::new(DEFAULT_FILE).exists().then(|| PathBuf::from(DEFAULT_FILE)));
        let Some(file) = file else { return validate::config(raw::Config::default(), environment) };
        let text = std::fs::read_to_string(&file).map_err(|source| ConfigError::Read { path: file.clone(), source })?;
        Self::parse(&text, environment).map_err(|error| error.in_file(&file))
    }

    /// Reads TOML text.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, environment: &Environment) -> Result<Self, ConfigError> {
        let raw: raw::Config =
            toml::from_str(text).map_err(|e| ConfigError::Parse { path: None, message: e.to_string() })?;
        validate::config(raw, environment)
    }
}

impl Default for Config {
    /// The values of an empty file, with no environment.
    fn default() -> Self {
        #[allow(clippy::expect_used)] // A constant input; a test proves that it is valid.
        validate::config(raw::Config::default(), &Environment::default()).expect("the defaults are valid")
    }
}

#[cfg(test)]
mod tests;
