//! `millrace result`: prints what a job has put out, and follows it if asked to.

use std::io::Write;
use std::process::ExitCode;

use millrace_protocol::JobId;
use millrace_protocol::output::Chunk;

use super::settings::SettingsArgs;
use crate::exit::{self, usage};
use crate::follow::{Printer, follow};
use crate::service::Service;

/// Options of `millrace result`.
#[derive(Debug, clap::Args)]
pub struct ResultArgs {
    /// The job's id
    #[arg(value_name = "JOB")]
    pub job: String,
    /// Print the text from its start as it grows, until the job ends
    #[arg(long)]
    pub follow: bool,
    /// Print output chunks as JSON lines
    #[arg(long)]
    pub json: bool,
}

/// Prints the final, or says how far the job is. Exit code 0 for an answered job, 1 for one that failed or runs.
///
/// # Errors
/// A usage fault for a bad id, an unavailable service.
pub async fn run(settings: &SettingsArgs, args: ResultArgs) -> anyhow::Result<ExitCode> {
    let job = JobId::new(args.job).map_err(|error| usage(error.to_string()))?;
    let service = Service::connect_to_running(&settings.load()?, "millrace result").await?;
    let answered = if args.follow {
        follow(&service, &job, args.json).await?
    } else {
        match service.last_chunk(&job).await? {
            None => {
                writeln!(
                    std::io::stderr(),
                    "{job}: no output; it waits, its output has expired, or there is no such job"
                )?;
                false
            }
            Some(last) => match &last.chunk {
                Chunk::Final(_) => {
                    let mut printer = Printer::new(args.json);
                    let ended = printer.print(&last, &mut std::io::stdout().lock(), &mut std::io::stderr())?;
                    ended == Some(true)
                }
                Chunk::Claim { .. } | Chunk::Delta { .. } => {
                    writeln!(std::io::stderr(), "{job}: runs, {} tokens so far; --follow prints them", last.index)?;
                    false
                }
            },
        }
    };
    service.close().await;
    Ok(if answered { ExitCode::SUCCESS } else { ExitCode::from(exit::FAILED) })
}
