//! `millrace random-weights`: a checkpoint of a given config in the official layout, for tests and measurements.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use millrace_executor::random_weights::{RandomOptions, write_random};

use crate::exit::usage;
use crate::stand_in::write_stand_in;

/// Options of `millrace random-weights`.
#[derive(Debug, clap::Args)]
pub struct RandomWeightsArgs {
    /// Folder with config.json, and the tokenizer files that are copied along
    #[arg(long, value_name = "DIR")]
    pub config: PathBuf,
    /// Folder to write into; made if it is missing
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Decoder layers [default: the config's]
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// The same seed gives the same bytes
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
}

/// Writes the checkpoint; files of the config's folder that are neither config nor weights are copied along.
///
/// # Errors
/// Usage faults for the folders or a config that no model takes.
pub async fn run(args: RandomWeightsArgs) -> anyhow::Result<ExitCode> {
    let RandomWeightsArgs { config, out, layers, seed } = args;
    std::fs::create_dir_all(&out).with_context(|| format!("--out {}", out.display()))?;
    if same(&config, &out) {
        return Err(usage("--out is the folder of --config: its weights would be lost; name another folder"));
    }
    copy_others(&config, &out).map_err(|error| usage(format!("--config {}: {error}", config.display())))?;
    let folder = out.clone();
    let written = tokio::task::spawn_blocking(move || write_random(&config, &folder, &RandomOptions { layers, seed }));
    let written = written.await?.map_err(|error| usage(error.to_string()))?;
    if write_stand_in(&out)? {
        eprintln!("millrace: the config has no tokenizer beside it: one that knows bytes alone stands in");
    }
    let (tensors, parameters, bytes) = (written.tensors, written.parameters, written.bytes);
    let place = out.display();
    writeln!(std::io::stdout().lock(), "{tensors} tensors, {parameters} parameters, {bytes} bytes in {place}")?;
    Ok(ExitCode::SUCCESS)
}

fn same(one: &Path, other: &Path) -> bool {
    let paths = (std::fs::canonicalize(one), std::fs::canonicalize(other));
    matches!(paths, (Ok(one), Ok(other)) if one == other)
}

/// Copies every file of a folder but config and weights.
pub(super) fn copy_others(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let written = text == "config.json" || text.contains(".safetensors");
        if entry.file_type()?.is_file() && !written {
            std::fs::copy(entry.path(), to.join(&name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_written_checkpoint_loads_and_keeps_the_tokenizer() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/model");
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("random");
        let args = |out: &Path, config: &Path| RandomWeightsArgs {
            config: config.to_path_buf(),
            out: out.to_path_buf(),
            layers: Some(2),
            seed: 1,
        };
        run(args(&out, &demo)).await.unwrap();
        assert!(crate::check_model::check_model(&out).is_ok());
        assert_eq!(
            std::fs::read(out.join("tokenizer.json")).unwrap(),
            std::fs::read(demo.join("tokenizer.json")).unwrap()
        );
        assert!(run(args(&out, &out)).await.unwrap_err().to_string().contains("another folder"));
        assert!(run(args(&folder.path().join("b"), Path::new("/no/such"))).await.is_err());
    }
}
