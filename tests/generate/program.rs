//! Runs `millrace generate` and takes its answer apart.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use millrace_preprocess::{MediaFetch, PrepareLimits, Prepared, Preparer};
use millrace_protocol::{ErrorCode, JobError, JobId, JobRequest};
use millrace_tests::service::binary;
use millrace_tests::workspace::root;
use serde_json::Value;

/// The demo checkpoint: a small Qwen3-VL.
pub fn demo() -> PathBuf {
    root().join("deploy/demo/model")
}

/// A file among the demo's clips and stills.
pub fn clip(name: &str) -> String {
    root().join("deploy/demo/clips").join(name).display().to_string()
}

/// Runs it on `model`.
pub fn run(model: &Path, args: &[&str]) -> Result<Output> {
    let model = model.display().to_string();
    Ok(Command::new(binary()?).args(["generate", "--model", &model]).args(args).current_dir(root()).output()?)
}

/// The last line of `--json` on the demo model.
pub fn answer(args: &[&str]) -> Result<Value> {
    let output = run(&demo(), &[args, &["--json"]].concat())?;
    ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let last = text.lines().last().context("nothing was printed")?;
    Ok(serde_json::from_str(last)?)
}

/// What it says about a fault, and its exit code.
pub fn fault(model: &Path, args: &[&str]) -> Result<(i32, String)> {
    let output = run(model, args)?;
    ensure!(!output.status.success(), "{args:?} went through");
    Ok((output.status.code().context("ended by a signal")?, String::from_utf8(output.stderr)?))
}

/// The answer's tokens.
pub fn tokens(answer: &Value) -> Vec<u64> {
    answer["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
}

/// Takes an object's name for a path.
struct Files;

impl MediaFetch for Files {
    async fn object(&self, name: &str, _: u64) -> Result<bytes::Bytes, JobError> {
        std::fs::read(name).map(Into::into).map_err(|error| JobError::new(ErrorCode::MediaMissing, error.to_string()))
    }
}

/// What preprocessing makes of a job for the demo model.
pub async fn prepared(job: Value) -> Result<Prepared> {
    let request: JobRequest = serde_json::from_value(job)?;
    let preparer = Preparer::load(&demo(), PrepareLimits::default())?;
    let gathered = preparer.gather(&request, &Files).await?;
    Ok(preparer.build(&request, &JobId::new("job")?, gathered, 0)?)
}

/// Ids as the flag takes them.
pub fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}
