//! `millrace check`: everything that would keep the service from starting, at once and before it is started.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use millrace_config::{Config, ConfigError, NatsUrl};

use super::settings::{SettingsArgs, parse_models, replace_models};
use crate::check_model::check_model;
use crate::check_program::{Program, check_program};
use crate::exit;
use crate::model_source::{ModelArg, ModelPlace};

/// Options of `millrace check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Model to check instead of those in `[[models]]`
    #[arg(long = "model", value_name = "DIR|OWNER/REPO[=NAME]")]
    pub models: Vec<String>,
}

/// The verdict on one thing.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What was looked at.
    pub subject: String,
    /// What was found, or every fault.
    pub outcome: Result<String, Vec<String>>,
}

/// Prints a verdict on the configuration, each model and each program.
///
/// # Errors
/// Standard output refused the text; faults found are not errors here but exit code 64.
pub async fn run(settings: &SettingsArgs, args: CheckArgs) -> anyhow::Result<ExitCode> {
    let mut verdicts = Vec::new();
    let mut config = match settings.try_load() {
        Ok(config) => {
            verdicts.push(Verdict { subject: "configuration".into(), outcome: Ok(settings.source()) });
            config
        }
        // The programs can be checked all the same; models named in a broken file cannot.
        Err(error) => {
            verdicts.push(Verdict { subject: "configuration".into(), outcome: Err(config_faults(&error)) });
            Config { models: Vec::new(), ..Config::default() }
        }
    };
    replace_models(&mut config, &parse_models(&args.models)?);
    for model in &config.models {
        verdicts.push(check_place(model.name.as_str(), &model.path));
    }
    for program in programs(&config) {
        verdicts.push(check_program(&program).await);
    }
    let mut out = std::io::stdout().lock();
    for verdict in &verdicts {
        out.write_all(lines(verdict).as_bytes())?;
    }
    let faulty = verdicts.iter().any(|verdict| verdict.outcome.is_err());
    Ok(if faulty { ExitCode::from(exit::USAGE) } else { ExitCode::SUCCESS })
}

fn config_faults(error: &ConfigError) -> Vec<String> {
    match error {
        ConfigError::Invalid { problems, .. } => problems.iter().map(ToString::to_string).collect(),
        ConfigError::Read { .. } | ConfigError::Parse { .. } => vec![error.to_string()],
    }
}

fn check_place(name: &str, path: &str) -> Verdict {
    let subject = format!("model {name}");
    if Path::new(path).is_dir() {
        return Verdict { subject, outcome: check_model(Path::new(path)) };
    }
    let outcome = match ModelArg::parse(path) {
        Ok(ModelArg { place: ModelPlace::Repository { id, revision }, .. }) => {
            Ok(format!("{id}@{revision}, checked when `millrace up` has fetched it"))
        }
        _ => Err(vec![format!(
            "{path} is neither a folder (from where this runs) nor a repository id; change its path in [[models]]"
        )]),
    };
    Verdict { subject, outcome }
}

fn programs(config: &Config) -> Vec<Program> {
    let mut programs = vec![
        Program::new("ffmpeg", &config.preprocess.ffmpeg, "-version", None, "[preprocess] ffmpeg"),
        Program::new("ffprobe", &config.preprocess.ffprobe, "-version", None, "[preprocess] ffprobe"),
    ];
    // With a server of one's own, none is started here.
    if !matches!(config.nats.url, NatsUrl::Url(_)) {
        let path = config.nats.server_path.clone().unwrap_or_else(|| "nats-server".into());
        let oldest = Some(millrace_bus::managed::MIN_VERSION_TEXT);
        programs.push(Program::new("nats-server", &path, "--version", oldest, "[nats] server_path"));
    }
    programs
}

/// Further lines of a fault start below its first.
const INDENT: &str = "\n                        ";

fn lines(verdict: &Verdict) -> String {
    let subject = &verdict.subject;
    match &verdict.outcome {
        Ok(found) => format!("{subject:<16} ok     {found}\n"),
        Err(faults) => {
            let line = |fault: &String| format!("{subject:<16} FAULT  {}\n", fault.trim().replace('\n', INDENT));
            faults.iter().map(line).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_has_its_line() {
        let verdict = |outcome| Verdict { subject: "model demo".into(), outcome };
        assert_eq!(lines(&verdict(Ok("fine".into()))), "model demo       ok     fine\n");
        let two = lines(&verdict(Err(vec!["a".into(), "b\nc\n".into()])));
        assert_eq!(two, "model demo       FAULT  a\nmodel demo       FAULT  b\n                        c\n");
    }

    #[test]
    fn a_broken_file_gives_every_key() {
        let text = "[nats]\nprefix = \"a.b\"\n[executor]\ndevice = \"tpu\"\n";
        let error = Config::parse(text, &millrace_config::Environment::default()).unwrap_err();
        let faults = config_faults(&error);
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(faults[0].starts_with("[nats] prefix") && faults[1].starts_with("[executor] device"), "{faults:?}");
    }

    #[test]
    fn a_model_that_is_nowhere_is_a_fault() {
        assert!(check_place("demo", "/no/such/folder").outcome.is_err());
        assert!(check_place("tiny", "lab/tiny@main").outcome.unwrap().starts_with("lab/tiny@main"));
    }

    #[test]
    fn a_server_elsewhere_needs_no_program_here() {
        let mut config = Config::default();
        assert_eq!(programs(&config).len(), 3);
        config.nats.url = NatsUrl::Url("nats://elsewhere:4222".into());
        assert_eq!(programs(&config).len(), 2);
    }
}
