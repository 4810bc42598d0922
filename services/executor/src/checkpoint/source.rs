//! Where tensors come from: a checkpoint's files, or a generator that writes one.

use std::ops::Range;

use candle_core::{DType, Tensor};
use millrace_kernels::MappedFile;

use crate::error::ExecutorError;

/// Where tensors of one dtype lie in files.
#[derive(Debug)]
pub struct Pieces<'f> {
    /// One tensor's bytes each.
    pub parts: Vec<(&'f MappedFile, Range<usize>)>,
    /// Of all of them.
    pub dtype: DType,
}

/// Tensors by name.
pub trait TensorSource {
    /// Whether `name` is there and was not taken yet.
    fn has(&self, name: &str) -> bool;

    /// Takes `name` as a host tensor.
    ///
    /// # Errors
    /// It is missing or has another shape.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ExecutorError>;

    /// Takes several matrices of `columns` columns as one, rows below rows: `parts` holds names and numbers of rows.
    ///
    /// # Errors
    /// One is missing or has another shape or dtype.
    fn take_stacked(&mut self, parts: &[(String, usize)], columns: usize) -> Result<Tensor, ExecutorError> {
        let parts: Result<Vec<_>, _> = parts.iter().map(|(name, rows)| self.take(name, &[*rows, columns])).collect();
        Tensor::cat(&parts?, 0).map_err(ExecutorError::candle)
    }

    /// Takes tensors of these names and shapes, which are to lie one behind the other, as they lie in files; `None`, and nothing is
    /// taken, from a source without files.
    ///
    /// # Errors
    /// As [`Self::take_stacked`].
    fn take_pieces(&mut self, _parts: &[(String, Vec<usize>)]) -> Result<Option<Pieces<'_>>, ExecutorError> {
        Ok(None)
    }

    /// Drops every tensor whose name starts with `prefix`; returns how many. For parts of a checkpoint that a model leaves
    /// out knowingly: the model file says why.
    fn leave_out(&mut self, prefix: &str) -> usize;
}
