//! `millrace submit`: publishes job documents, one JSON document or one a line, and follows them if asked to.

use std::io::{Read, Write};
use std::process::ExitCode;

use anyhow::Context;
use millrace_protocol::{Class, JobId, JobRequest, ModelName};
use millrace_runtime::Clock;

use super::settings::SettingsArgs;
use crate::caption::run::fresh_prefix;
use crate::exit::{self, usage};
use crate::follow::follow;
use crate::service::Service;

/// Options of `millrace submit`.
#[derive(Debug, clap::Args)]
pub struct SubmitArgs {
    /// Job documents (docs/asyncapi.json): one JSON object, or one a line; `-` is standard input
    #[arg(value_name = "FILE")]
    pub file: String,
    /// Model for jobs that name none [default: the configured default]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Service class: interactive, batch or stream
    #[arg(long, value_name = "CLASS", default_value = "interactive", value_parser = super::caption::class)]
    pub class: Class,
    /// Id of a single job that names none [default: a new one]
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
    /// Print each answer and wait for its end
    #[arg(long)]
    pub wait: bool,
    /// With --wait: print the output chunks as JSON lines
    #[arg(long, requires = "wait")]
    pub json: bool,
}

/// Publishes the jobs. Without `--wait` their ids are printed, one a line.
///
/// # Errors
/// Usage faults for documents that are no jobs (nothing is published then), an unavailable service.
pub async fn run(settings: &SettingsArgs, args: SubmitArgs) -> anyhow::Result<ExitCode> {
    let config = settings.load()?;
    let text = read(&args.file)?;
    let default = match &args.model {
        Some(name) => ModelName::new(name.as_str()).map_err(|error| usage(format!("--model: {error}")))?,
        None => {
            config.default_model().map(|model| model.name.clone()).context("no model is configured; give --model")?
        }
    };
    let jobs = jobs(&text, args.id.as_deref(), &fresh_prefix(&Clock::system()))?;
    let service = Service::connect_to_running(&config, "millrace submit").await?;
    let mut code = ExitCode::SUCCESS;
    for job in jobs {
        let model = job.request.model.clone().unwrap_or_else(|| default.clone());
        service.publish_document(args.class, &model, &job.id, job.document).await?;
        if !args.wait {
            writeln!(std::io::stdout().lock(), "{}", job.id)?;
        } else if !follow(&service, &job.id, args.json).await? {
            code = ExitCode::from(exit::FAILED);
        }
    }
    service.close().await;
    Ok(code)
}

fn read(file: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = match file {
        "-" => std::io::stdin().lock().read_to_string(&mut text).map(|_| ()),
        path => std::fs::read_to_string(path).map(|read| text = read),
    };
    read.map_err(|error| usage(format!("{file}: {error}")))?;
    Ok(text)
}

#[derive(Debug)]
struct Job {
    id: JobId,
    request: JobRequest,
    /// The document as it was written: the service judges what the publisher said, not our copy of it.
    document: Vec<u8>,
}

/// Reads one document or one a line. Every faulty one is named.
fn jobs(text: &str, id: Option<&str>, prefix: &str) -> anyhow::Result<Vec<Job>> {
    let whole = serde_json::from_str::<serde_json::Value>(text).is_ok();
    let lines: Vec<(usize, &str)> = match whole {
        true => vec![(1, text)],
        false => text
            .lines()
            .enumerate()
            .map(|(at, line)| (at + 1, line))
            .filter(|(_, line)| !line.trim().is_empty())
            .collect(),
    };
    if lines.is_empty() {
        return Err(usage("no job: the input is empty"));
    }
    if id.is_some() && lines.len() > 1 {
        return Err(usage("--id names one job, but the input holds several; put an `id` into each"));
    }
    let (mut jobs, mut faults) = (Vec::new(), Vec::new());
    for (number, line) in lines {
        // serde would also take an array for a struct.
        let read = match line.trim_start().starts_with('{') {
            true => serde_json::from_str::<JobRequest>(line).map_err(|error| error.to_string()),
            false => Err("a job is a JSON object".to_string()),
        };
        match read {
            Ok(request) => {
                let flag = id.map(JobId::new).transpose().map_err(|error| usage(format!("--id: {error}")))?;
                if let (Some(flag), Some(own)) = (&flag, &request.id)
                    && flag != own
                {
                    return Err(usage(format!("--id {flag}: the document says `{own}`; leave one of them out")));
                }
                let given = request.id.clone().or(flag);
                let id = given.map_or_else(|| JobId::new(format!("{prefix}-{number}")), Ok)?;
                jobs.push(Job { id, request, document: line.trim().as_bytes().to_vec() });
            }
            Err(error) if whole => faults.push(error),
            Err(error) => faults.push(format!("line {number}: {error}")),
        }
    }
    if faults.is_empty() { Ok(jobs) } else { Err(usage(format!("not a job document: {}", faults.join("; ")))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str, id: Option<&str>) -> Result<Vec<String>, String> {
        let jobs = jobs(text, id, "new").map_err(|error| error.to_string())?;
        Ok(jobs.iter().map(|job| job.id.to_string()).collect())
    }

    #[test]
    fn one_document_may_span_lines_and_several_take_one_each() {
        assert_eq!(ids("{\n\"prompt\": \"Hi\"\n}\n", None).unwrap(), ["new-1"]);
        assert_eq!(ids("{\"prompt\":\"a\",\"id\":\"x\"}\n\n{\"prompt\":\"b\"}\n", None).unwrap(), ["x", "new-3"]);
        assert_eq!(ids("{\"prompt\":\"a\"}", Some("mine")).unwrap(), ["mine"]);
    }

    #[test]
    fn every_faulty_document_is_named() {
        let fault = ids("{\"prompt\":\"a\"}\n{\"promt\":\"b\"}\nnot json\n", None).unwrap_err();
        assert!(fault.contains("line 2: unknown field `promt`") && fault.contains("line 3:"), "{fault}");
        assert!(ids("", None).unwrap_err().contains("empty"));
        assert!(ids("[]", None).unwrap_err().contains("not a job document"));
        assert!(ids("{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}", Some("x")).unwrap_err().contains("--id"));
        assert!(ids("{\"prompt\":\"a\"}", Some("a.b")).unwrap_err().contains("--id"));
        assert!(ids("{\"prompt\":\"a\",\"id\":\"x\"}", Some("y")).unwrap_err().contains("says `x`"));
    }

    #[test]
    fn a_document_is_sent_as_it_was_written() {
        let jobs = jobs("  {\"prompt\": \"Hi\"}  ", None, "new").unwrap();
        assert_eq!(jobs[0].document, b"{\"prompt\": \"Hi\"}");
    }
}
