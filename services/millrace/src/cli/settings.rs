//! The configuration a command runs with: pipeline.toml, the environment, then `--nats` and `--model`.

use std::path::{Path, PathBuf};

use millrace_config::{Config, ConfigError, DEFAULT_FILE, Environment, Model};
use millrace_telemetry::{LogForm, init_logs};

use crate::exit::usage;
use crate::model_source::{Hub, ModelArg, ModelPlace, fetch};

/// Options that every command takes.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SettingsArgs {
    /// Configuration file [default: $MILLRACE_CONFIG, else ./pipeline.toml if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// NATS server, `auto` or `managed`; wins over `[nats] url`
    #[arg(long, global = true, value_name = "URL")]
    pub nats: Option<String>,
}

impl SettingsArgs {
    /// Reads and validates the configuration.
    ///
    /// # Errors
    /// A usage fault that lists every invalid key.
    pub fn load(&self) -> anyhow::Result<Config> {
        self.try_load().map_err(|error| usage(error.to_string()))
    }

    /// Logs for commands that a person runs: errors only, unless `MILLRACE_LOG` asks for more. What matters to the person
    /// is in the command's own words.
    ///
    /// # Errors
    /// A usage fault for a filter that does not parse.
    pub fn quiet_logs() -> anyhow::Result<()> {
        let filter = Environment::read().log_filter.unwrap_or_else(|| "error".to_string());
        init_logs(LogForm::Text, &filter).map_err(|error| usage(error.to_string()))
    }

    /// Where the configuration comes from, in words.
    pub fn source(&self) -> String {
        let named = self.config.clone().or_else(|| Environment::read().config_path);
        match named {
            Some(path) => path.display().to_string(),
            None if Path::new(DEFAULT_FILE).exists() => DEFAULT_FILE.to_string(),
            None => format!("the defaults; there is no {DEFAULT_FILE} here"),
        }
    }

    /// As [`SettingsArgs::load`], with the fault as a value.
    ///
    /// # Errors
    /// The configuration's.
    pub fn try_load(&self) -> Result<Config, ConfigError> {
        let mut environment = Environment::read();
        if let Some(url) = &self.nats {
            environment.nats_url = Some(url.clone());
        }
        Config::load_with(self.config.as_deref(), &environment)
    }
}

/// Reads `--model` arguments.
///
/// # Errors
/// A usage fault for the first that is neither folder nor repository, or a name given twice.
pub fn parse_models(texts: &[String]) -> anyhow::Result<Vec<ModelArg>> {
    let models = texts.iter().map(|text| ModelArg::parse(text)).collect::<anyhow::Result<Vec<_>>>()?;
    for (number, model) in models.iter().enumerate() {
        if models[..number].iter().any(|earlier| earlier.name == model.name) {
            return Err(usage(format!("--model: two models are named `{}`; add =NAME to one", model.name)));
        }
    }
    Ok(models)
}

/// Puts `models` in place of the configured ones, if there are any; the first becomes the default.
pub fn replace_models(config: &mut Config, models: &[ModelArg]) {
    if models.is_empty() {
        return;
    }
    let text = |place: &ModelPlace| match place {
        ModelPlace::Folder(folder) => folder.to_string_lossy().into_owned(),
        ModelPlace::Repository { id, revision } => format!("{id}@{revision}"),
    };
    let entry = |(number, model): (usize, &ModelArg)| Model {
        name: model.name.clone(),
        path: text(&model.place),
        default: number == 0,
    };
    config.models = models.iter().enumerate().map(entry).collect();
}

/// Fetches every configured model that is a repository, so that all paths are folders afterwards.
///
/// # Errors
/// As [`fetch`]; a usage fault for a path that is neither folder nor repository.
pub async fn fetch_models(config: &mut Config) -> anyhow::Result<()> {
    for model in &mut config.models {
        if Path::new(&model.path).is_dir() {
            continue;
        }
        let place = ModelArg::parse(&model.path)
            .map_err(|_| {
                let (name, path) = (&model.name, &model.path);
                usage(format!("model `{name}`: {path} is neither a folder (from where this runs) nor a repository id; change its path in [[models]] or give --model DIR"))
            })?
            .place;
        if let ModelPlace::Repository { id, revision } = place {
            let fetched = tokio::task::spawn_blocking(move || fetch(&id, &revision, &Hub::default())).await??;
            model.path = fetched.to_string_lossy().into_owned();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_on_the_command_line_replace_the_configured_ones() {
        let folder = tempfile::tempdir().unwrap();
        let text = |name: &str| format!("{}={name}", folder.path().display());
        let mut config = Config::default();
        replace_models(&mut config, &parse_models(&[]).unwrap());
        assert_eq!(config, Config::default());

        replace_models(&mut config, &parse_models(&[text("a"), text("b"), "lab/tiny".into()]).unwrap());
        let names: Vec<_> = config.models.iter().map(|model| (model.name.as_str(), model.default)).collect();
        assert_eq!(names, [("a", true), ("b", false), ("tiny", false)]);
        assert_eq!(config.models[2].path, "lab/tiny@main");
        assert!(parse_models(&[text("a"), text("a")]).unwrap_err().to_string().contains("add =NAME"));
    }
}
