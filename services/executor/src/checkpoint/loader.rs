//! Takes tensors out of a checkpoint onto a device, below a name prefix, and fuses those that are used together.

use candle_core::Tensor;
use millrace_kernels::Backend;

use super::{Pieces, TensorSource};
use crate::error::ExecutorError;

/// A place in the tensor tree.
pub struct Loader<'a, B: Backend> {
    weights: &'a mut dyn TensorSource,
    backend: &'a B,
    prefix: String,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// The root of `weights`.
    pub fn new(weights: &'a mut dyn TensorSource, backend: &'a B) -> Self {
        Self { weights, backend, prefix: String::new() }
    }

    /// The tensors below `name`.
    pub fn below(&mut self, name: impl std::fmt::Display) -> Loader<'_, B> {
        Loader { prefix: self.name(&name), weights: self.weights, backend: self.backend }
    }

    fn name(&self, name: &impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// Takes a rotation's frequencies onto the device; see [`Backend::frequencies`].
    ///
    /// # Errors
    /// Axes that do not match.
    pub fn frequencies(
        &self,
        inverse: &[f32],
        axes: &[u32],
        positions: usize,
    ) -> Result<B::Frequencies, ExecutorError> {
        Ok(self.backend.frequencies(inverse, axes, positions)?)
    }

    /// Whether `name` is there.
    pub fn has(&self, name: &str) -> bool {
        self.weights.has(&self.name(&name))
    }

    /// One tensor of exactly `shape`.
    ///
    /// # Errors
    /// It is missing or has another shape.
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<B::Tensor, ExecutorError> {
        self.reshaped(name, shape, shape)
    }

    /// One tensor of exactly `shape`, seen as `view` (the same number of elements).
    ///
    /// # Errors
    /// It is missing or has another shape.
    pub fn reshaped(&mut self, name: &str, shape: &[usize], view: &[usize]) -> Result<B::Tensor, ExecutorError> {
        if let Some(Pieces { parts, dtype }) = self.weights.take_pieces(&[(self.name(&name), shape.to_vec())])? {
            return Ok(self.backend.mapped_weight(&parts, dtype, view)?);
        }
        let host = self.host(name, shape)?.reshape(view).map_err(ExecutorError::candle)?;
        Ok(self.backend.weight(&host)?)
    }

    /// One tensor of exactly `shape` on the host, in the file's dtype.
    ///
    /// # Errors
    /// It is missing or has another shape.
    pub fn host(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ExecutorError> {
        self.weights.take(&self.name(&name), shape)
    }

    /// Takes the tensor `root`, named from the root, and compares it with `copy`.
    ///
    /// # Errors
    /// It is missing, has another shape or other values.
    pub fn expect_copy(&mut self, copy: &Tensor, root: &str) -> Result<(), ExecutorError> {
        let original = self.weights.take(root, copy.dims())?;
        let same = copy.eq(&original).and_then(|same| same.flatten_all()?.min(0)?.to_scalar::<u8>());
        if same.map_err(ExecutorError::candle)? == 1 {
            return Ok(());
        }
        Err(ExecutorError::Unsupported(format!("a table below `{}` that differs from `{root}`", self.prefix)))
    }

    /// One tensor of exactly `shape` in f32 whatever the device's dtype.
    ///
    /// # Errors
    /// It is missing or has another shape.
    pub fn tensor_f32(&mut self, name: &str, shape: &[usize]) -> Result<B::Tensor, ExecutorError> {
        let host = self.host(name, shape)?;
        Ok(self.backend.weight_f32(&host)?)
    }

    /// Leaves out every tensor below `name`; returns how many. For what a model skips knowingly.
    pub fn leave_out(&mut self, name: &str) -> usize {
        let prefix = format!("{}.", self.name(&name));
        self.weights.leave_out(&prefix)
    }

    /// Several matrices as one, rows below rows in the table's order: `(name, rows)`, all with `columns` columns. One GEMM
    /// then computes what several would.
    ///
    /// # Errors
    /// One is missing or has another shape.
    pub fn stacked(&mut self, table: &[(&str, usize)], columns: usize) -> Result<B::Tensor, ExecutorError> {
        let rows = table.iter().map(|(_, rows)| rows).sum();
        self.stacked_as(table, columns, &[rows, columns])
    }

    /// As [`Self::stacked`], seen as `view`.
    ///
    /// # Errors
    /// One is missing or has another shape.
    pub fn stacked_as(
        &mut self,
        table: &[(&str, usize)],
        columns: usize,
        view: &[usize],
    ) -> Result<B::Tensor, ExecutorError> {
        let shapes: Vec<_> = table.iter().map(|(name, rows)| (self.name(name), vec![*rows, columns])).collect();
        if let Some(Pieces { parts, dtype }) = self.weights.take_pieces(&shapes)? {
            return Ok(self.backend.mapped_weight(&parts, dtype, view)?);
        }
        let parts: Vec<_> = table.iter().map(|(name, rows)| (self.name(name), *rows)).collect();
        let host = self.weights.take_stacked(&parts, columns)?.reshape(view).map_err(ExecutorError::candle)?;
        Ok(self.backend.weight(&host)?)
    }
}
