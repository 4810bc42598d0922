//! The feed-forward half of a decoder layer: dense, or a mixture of experts.

use millrace_kernels::Backend;

use super::{Linear, Moe};
use crate::checkpoint::Loader;
use crate::error::ExecutorError;

/// Either kind.
pub enum Ffn<B: Backend> {
    /// One network for all tokens.
    Dense(SwiGlu<B>),
    /// A few of many networks for each token.
    Moe(Moe<B>),
}

impl<B: Backend> Ffn<B> {
    /// `x [T, H]` -> `[T, H]`.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        match self {
            Self::Dense(dense) => dense.forward(backend, x),
            Self::Moe(moe) => moe.forward(backend, x),
        }
    }
}

/// `down(silu(gate x) * up x)`.
pub struct SwiGlu<B: Backend> {
    gate_up: Linear<B>,
    down: Linear<B>,
}

impl<B: Backend> SwiGlu<B> {
    /// `gate_proj` and `up_proj` (fused), `down_proj`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, hidden: usize, intermediate: usize) -> Result<Self, ExecutorError> {
        let fused = [("gate_proj.weight", intermediate), ("up_proj.weight", intermediate)];
        Ok(Self {
            gate_up: Linear::load_stacked(loader, &fused, hidden)?,
            down: Linear::load(loader, "down_proj", hidden, intermediate)?,
        })
    }

    /// `x [T, H]` -> `[T, H]`.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        self.down.forward(backend, &self.gate_up.forward_swiglu(backend, x)?)
    }
}
