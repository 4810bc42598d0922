//! `millrace cancel`: asks for the end of a job, wherever it is.

use std::io::Write;
use std::process::ExitCode;

use millrace_protocol::JobId;

use super::settings::SettingsArgs;
use crate::exit::usage;
use crate::service::Service;

/// Options of `millrace cancel`.
#[derive(Debug, clap::Args)]
pub struct CancelArgs {
    /// Ids of the jobs
    #[arg(required = true, value_name = "JOB")]
    pub jobs: Vec<String>,
}

/// Leaves a tombstone for each job that waits and tells whoever runs it. Jobs that have ended stay as they are.
///
/// # Errors
/// A usage fault for a bad id, an unavailable service.
pub async fn run(settings: &SettingsArgs, args: CancelArgs) -> anyhow::Result<ExitCode> {
    let ids = args.jobs.iter().map(|job| JobId::new(job.as_str())).collect::<Result<Vec<_>, _>>();
    let ids = ids.map_err(|error| usage(error.to_string()))?;
    let service = Service::connect_to_running(&settings.load()?, "millrace cancel").await?;
    for job in &ids {
        service.cancel(job).await?;
        writeln!(std::io::stderr(), "{job}: cancellation sent; `millrace result {job}` shows its end")?;
    }
    service.close().await;
    Ok(ExitCode::SUCCESS)
}
