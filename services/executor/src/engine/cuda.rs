//! Engines on CUDA devices.

use std::path::Path;

use millrace_kernels::CudaBackend;

use super::{Dtype, LoadOptions, StepEngine, load_on};
use crate::error::ExecutorError;

/// Whether device `ordinal` can be used.
///
/// # Errors
/// Why not.
pub(super) fn probe(ordinal: usize) -> Result<(), ExecutorError> {
    CudaBackend::new(ordinal, false).map(drop).map_err(ExecutorError::from)
}

/// Loads the model of `dir` onto device `ordinal`.
///
/// # Errors
/// No such device, another precision than bf16, or as [`super::load`].
pub(super) fn load(dir: &Path, ordinal: usize, options: &LoadOptions) -> Result<Box<dyn StepEngine>, ExecutorError> {
    if options.dtype != Dtype::Bf16 {
        return Err(ExecutorError::Option { option: "dtype", what: "must be bf16 on CUDA devices".into() });
    }
    let backend = CudaBackend::new(ordinal, true)?;
    tracing::info!(device = backend.description(), "CUDA device opened");
    Ok(Box::new(load_on(dir, backend, options)?))
}
