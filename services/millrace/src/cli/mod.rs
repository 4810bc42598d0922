//! The command line: arguments and dispatch. One file per command.

pub mod asyncapi;
pub mod bench;
pub mod cancel;
pub mod caption;
pub mod check;
pub mod generate;
pub mod random_weights;
pub mod result;
pub mod serve;
pub mod settings;
pub mod status;
pub mod submit;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::signals::unless_stopped;

/// Turns jobs on NATS (text, images, clips) into generated text.
#[derive(Debug, Parser)]
#[command(name = "millrace", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub settings: settings::SettingsArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "Examples:
  millrace caption clip.mp4 --model deploy/demo/model    caption a file; starts what it needs
  millrace up                                            run the service until Ctrl-C
  millrace submit job.json --wait                        publish a job, print its answer";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the whole service in one process.
    Up(serve::ServeArgs),
    /// Run preprocess actors alone.
    Preprocess(serve::ServeArgs),
    /// Run schedulers alone.
    Schedule(serve::ServeArgs),
    /// Run executors alone.
    Execute(serve::ServeArgs),
    /// Caption videos and images.
    Caption(caption::CaptionArgs),
    /// Publish job documents.
    Submit(submit::SubmitArgs),
    /// Print a job's output.
    Result(result::ResultArgs),
    /// Cancel a job.
    Cancel(cancel::CancelArgs),
    /// Show services, models, streams and lag.
    Status(status::StatusArgs),
    /// Check pipeline.toml, models and programs; print all faults at once.
    Check(check::CheckArgs),
    /// Generate one answer in this process, without NATS.
    Generate(Box<generate::GenerateArgs>),
    /// Measure a service: publish jobs, read every result.
    Bench(Box<bench::BenchArgs>),
    /// Write a checkpoint with random weights for a config.
    RandomWeights(random_weights::RandomWeightsArgs),
    /// Print the AsyncAPI document of the public subjects.
    Asyncapi,
}

impl Command {
    /// Whether it runs until it is told to stop; such a process logs as pipeline.toml says.
    fn serves(&self) -> bool {
        matches!(self, Self::Up(_) | Self::Preprocess(_) | Self::Schedule(_) | Self::Execute(_))
    }
}

/// Runs one command.
///
/// # Errors
/// What a person must know; [`crate::exit::code_of`] gives its exit code.
pub async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let settings = cli.settings;
    if !cli.command.serves() {
        settings::SettingsArgs::quiet_logs()?;
    }
    match cli.command {
        Command::Up(args) => serve::run(&settings, &args, serve::ALL).await,
        Command::Preprocess(args) => serve::run(&settings, &args, serve::PREPROCESS).await,
        Command::Schedule(args) => serve::run(&settings, &args, serve::SCHEDULE).await,
        Command::Execute(args) => serve::run(&settings, &args, serve::EXECUTE).await,
        Command::Caption(args) => caption::run(&settings, args).await,
        Command::Submit(args) => submit::run(&settings, args).await,
        Command::Result(args) => result::run(&settings, args).await,
        Command::Cancel(args) => cancel::run(&settings, args).await,
        Command::Status(args) => status::run(&settings, args).await,
        Command::Check(args) => check::run(&settings, args).await,
        Command::Generate(args) => generate::run(&settings, *args).await,
        // In this process it computes without a pause in which a signal could be heard, and starts nothing.
        Command::Bench(args) if args.no_nats => bench::run(&settings, *args).await,
        Command::Bench(args) => unless_stopped(bench::run(&settings, *args)).await,
        Command::RandomWeights(args) => random_weights::run(args).await,
        Command::Asyncapi => asyncapi::run(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_all_commands_stand_before_or_behind_the_command() {
        for line in ["millrace --nats nats://a:1 status", "millrace status --nats nats://a:1"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.settings.nats.as_deref(), Some("nats://a:1"), "{line}");
        }
    }

    #[test]
    fn random_weights_has_a_config_of_its_own() {
        let cli = Cli::try_parse_from("millrace random-weights --config in --out out --layers 2".split(' ')).unwrap();
        let Command::RandomWeights(args) = cli.command else { panic!("another command") };
        assert_eq!((args.config.to_str(), args.out.to_str(), args.layers), (Some("in"), Some("out"), Some(2)));
    }

    #[test]
    fn generate_wants_exactly_one_thing_to_go_on_from() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("millrace generate --prompt x").is_ok());
        assert!(parse("millrace generate --ids 1,2,3 --frames a.png,b.png --fps 2").is_ok());
        for bad in ["", " --prompt x --ids 1", " --ids 1,x", " --prompt x --frames a.png", " --prompt x --logprobs 2"] {
            assert!(parse(&format!("millrace generate{bad}")).is_err(), "{bad}");
        }
    }
}
