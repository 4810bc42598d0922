//! The command line: arguments and dispatch. One file per command.

pub mod asyncapi;
pub mod cancel;
pub mod caption;
pub mod check;
pub mod generate;
pub mod result;
pub mod serve;
pub mod settings;
pub mod status;
pub mod submit;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
        Command::Asyncapi => asyncapi::run(),
    }
}
