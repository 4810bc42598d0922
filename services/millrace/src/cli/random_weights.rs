//! `millrace random-weights`: a checkpoint of a given config in the official layout, for tests and measurements.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use millrace_executor::random_weights::{RandomOptions, write_random};

use crate::exit::usage;

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
