//! `millrace up`, `preprocess`, `schedule`, `execute`: settings, then the composition root.

use std::process::ExitCode;

use millrace_config::LogFormat;
use millrace_telemetry::{LogForm, Registry, init_logs};

use super::settings::{SettingsArgs, fetch_models, parse_models, replace_models};
use crate::compose::{self, Roles};
use crate::exit::usage;

/// Every role.
pub const ALL: Roles = Roles { preprocess: true, schedule: true, execute: true };
/// `millrace preprocess`.
pub const PREPROCESS: Roles = Roles { preprocess: true, schedule: false, execute: false };
/// `millrace schedule`.
pub const SCHEDULE: Roles = Roles { preprocess: false, schedule: true, execute: false };
/// `millrace execute`.
pub const EXECUTE: Roles = Roles { preprocess: false, schedule: false, execute: true };

/// Options of the commands that serve.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// Model to serve instead of those in `[[models]]`: a folder or a Hugging Face repository
    #[arg(long = "model", value_name = "DIR|OWNER/REPO[=NAME]")]
    pub models: Vec<String>,
}

/// Serves until SIGTERM or Ctrl-C.
///
/// # Errors
/// Invalid settings, or whatever keeps an actor from starting.
pub async fn run(settings: &SettingsArgs, args: &ServeArgs, roles: Roles) -> anyhow::Result<ExitCode> {
    let mut config = settings.load()?;
    let form = match config.telemetry.log_format {
        LogFormat::Text => LogForm::Text,
        LogFormat::Json => LogForm::Json,
    };
    init_logs(form, &config.telemetry.log_filter).map_err(|error| usage(error.to_string()))?;
    replace_models(&mut config, &parse_models(&args.models)?);
    fetch_models(&mut config).await?;
    compose::run(config, roles, Registry::new()).await
}
