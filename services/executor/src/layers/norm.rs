//! Normalisations over the last dimension.

use millrace_kernels::Backend;

use crate::checkpoint::Loader;
use crate::error::ExecutorError;

/// Root-mean-square norm with a weight.
pub struct RmsNorm<B: Backend> {
    weight: B::Tensor,
    eps: f32,
}

impl<B: Backend> RmsNorm<B> {
    /// `{name}.weight [size]`.
    ///
    /// # Errors
    /// The tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, name: &str, size: usize, eps: f32) -> Result<Self, ExecutorError> {
        Ok(Self { weight: loader.below(name).tensor("weight", &[size])?, eps })
    }

    /// The weight `[size]`, for fused ops.
    pub fn weight(&self) -> &B::Tensor {
        &self.weight
    }

    /// `x [.., size]` -> same shape.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        Ok(backend.rms_norm(x, &self.weight, self.eps)?)
    }

    /// Adds `x` to `residual`, then norms: (sum, normed sum).
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn add_forward(
        &self,
        backend: &B,
        residual: &B::Tensor,
        x: &B::Tensor,
    ) -> Result<(B::Tensor, B::Tensor), ExecutorError> {
        Ok(backend.add_rms_norm(residual, x, &self.weight, self.eps)?)
    }
}

/// Layer norm with weight and bias.
pub struct LayerNorm<B: Backend> {
    weight: B::Tensor,
    bias: B::Tensor,
    eps: f32,
}

impl<B: Backend> LayerNorm<B> {
    /// `{name}.weight` and `{name}.bias`, `[size]` each.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, name: &str, size: usize, eps: f32) -> Result<Self, ExecutorError> {
        let mut own = loader.below(name);
        Ok(Self { weight: own.tensor("weight", &[size])?, bias: own.tensor("bias", &[size])?, eps })
    }

    /// `x [.., size]` -> same shape.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        Ok(backend.layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }

    /// Adds `x` to `residual`, then norms: (sum, normed sum).
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn add_forward(
        &self,
        backend: &B,
        residual: &B::Tensor,
        x: &B::Tensor,
    ) -> Result<(B::Tensor, B::Tensor), ExecutorError> {
        Ok(backend.add_layer_norm(residual, x, &self.weight, &self.bias, self.eps)?)
    }
}
