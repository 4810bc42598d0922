//! In place of `cuda.rs` in a build without feature `cuda`: says so.

use std::path::Path;

use millrace_kernels::KernelError;

use super::{LoadOptions, StepEngine};
use crate::error::ExecutorError;

fn absent() -> ExecutorError {
    KernelError::NoDevice(
        "this build has no CUDA backend; build with `--features cuda`, or use the device `cpu`".into(),
    )
    .into()
}

pub(super) fn probe(_ordinal: usize) -> Result<(), ExecutorError> {
    Err(absent())
}

pub(super) fn load(_dir: &Path, _ordinal: usize, _options: &LoadOptions) -> Result<Box<dyn StepEngine>, ExecutorError> {
    Err(absent())
}
