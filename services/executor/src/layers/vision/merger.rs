//! Patch merger: `merge x merge` neighbouring patches become one row of the language model's size.

use millrace_kernels::{Backend, GeluKind};

use super::VisionConfig;
use super::tower::NORM_EPS;
use crate::checkpoint::Loader;
use crate::error::ExecutorError;
use crate::layers::{LayerNorm, Linear};

/// Where a merger normalises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlace {
    /// Each patch before merging (final merger).
    Patch,
    /// Each merged row (deepstack mergers).
    Merged,
}

/// Norm, two projections and an exact GELU between them.
pub struct Merger<B: Backend> {
    norm: LayerNorm<B>,
    place: NormPlace,
    up: Linear<B>,
    down: Linear<B>,
    /// Elements of a merged row.
    merged: usize,
}

impl<B: Backend> Merger<B> {
    /// `norm`, `linear_fc1`, `linear_fc2`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, config: &VisionConfig, place: NormPlace) -> Result<Self, ExecutorError> {
        let merged = config.hidden * config.merge * config.merge;
        let normed = if place == NormPlace::Patch { config.hidden } else { merged };
        Ok(Self {
            norm: LayerNorm::load(loader, "norm", normed, NORM_EPS)?,
            place,
            up: Linear::load_biased(loader, "linear_fc1", merged, merged)?,
            down: Linear::load_biased(loader, "linear_fc2", config.output, merged)?,
            merged,
        })
    }

    /// `x [N, hidden]` -> `[N / merge², output]`; patches of one merged row are neighbours in `x`.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        let elements: usize = backend.shape(x).iter().product();
        let merge = |x: &B::Tensor| backend.reshape(x, &[elements / self.merged, self.merged]);
        let rows = match self.place {
            NormPlace::Patch => merge(&self.norm.forward(backend, x)?)?,
            NormPlace::Merged => self.norm.forward(backend, &merge(x)?)?,
        };
        let up = backend.gelu(&self.up.forward(backend, &rows)?, GeluKind::Erf)?;
        self.down.forward(backend, &up)
    }
}
