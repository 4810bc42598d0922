//! A dense projection with an optional bias.

use millrace_kernels::Backend;

use crate::checkpoint::Loader;
use crate::error::ExecutorError;

/// `y = x W^T (+ b)`.
pub struct Linear<B: Backend> {
    weight: B::Tensor,
    bias: Option<B::Tensor>,
}

impl<B: Backend> Linear<B> {
    /// `{name}.weight [outputs, inputs]`.
    ///
    /// # Errors
    /// The tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, name: &str, outputs: usize, inputs: usize) -> Result<Self, ExecutorError> {
        let weight = loader.below(name).tensor("weight", &[outputs, inputs])?;
        Ok(Self { weight, bias: None })
    }

    /// `{name}.weight [outputs, inputs]` and `{name}.bias [outputs]`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load_biased(
        loader: &mut Loader<'_, B>,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Self, ExecutorError> {
        let mut own = loader.below(name);
        Ok(Self { weight: own.tensor("weight", &[outputs, inputs])?, bias: Some(own.tensor("bias", &[outputs])?) })
    }

    /// A projection from tensors at hand.
    pub fn from_parts(weight: B::Tensor, bias: Option<B::Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Several projections of the same input as one: `table` holds `(name, outputs)`, see [`Loader::stacked`].
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load_stacked(
        loader: &mut Loader<'_, B>,
        table: &[(&str, usize)],
        inputs: usize,
    ) -> Result<Self, ExecutorError> {
        Ok(Self { weight: loader.stacked(table, inputs)?, bias: None })
    }

    /// SwiGLU of the projection, whose first half of outputs is the gate: `x [T, inputs]` -> `[T, outputs / 2]`. No bias.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward_swiglu(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        Ok(backend.linear_swiglu(x, &self.weight)?)
    }

    /// `x [T, inputs]` -> `[T, outputs]`.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        Ok(backend.linear(x, &self.weight, self.bias.as_ref())?)
    }
}
