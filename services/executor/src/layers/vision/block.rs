//! One transformer block of the tower.

use millrace_kernels::{Backend, GeluKind};

use super::VisionConfig;
use super::tower::NORM_EPS;
use crate::checkpoint::Loader;
use crate::error::ExecutorError;
use crate::layers::{LayerNorm, Linear};

/// `h += attention(norm(h)); h += mlp(norm(h))` with biases everywhere.
pub struct VisionBlock<B: Backend> {
    norm1: LayerNorm<B>,
    qkv: Linear<B>,
    output: Linear<B>,
    norm2: LayerNorm<B>,
    up: Linear<B>,
    down: Linear<B>,
    gelu: GeluKind,
    heads: usize,
    scale: f32,
}

impl<B: Backend> VisionBlock<B> {
    /// `norm1`, `attn.qkv`, `attn.proj`, `norm2`, `mlp.linear_fc1`, `mlp.linear_fc2`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, config: &VisionConfig) -> Result<Self, ExecutorError> {
        let (hidden, intermediate) = (config.hidden, config.intermediate);
        Ok(Self {
            norm1: LayerNorm::load(loader, "norm1", hidden, NORM_EPS)?,
            qkv: Linear::load_biased(loader, "attn.qkv", 3 * hidden, hidden)?,
            output: Linear::load_biased(loader, "attn.proj", hidden, hidden)?,
            norm2: LayerNorm::load(loader, "norm2", hidden, NORM_EPS)?,
            up: Linear::load_biased(loader, "mlp.linear_fc1", intermediate, hidden)?,
            down: Linear::load_biased(loader, "mlp.linear_fc2", hidden, intermediate)?,
            gelu: config.gelu,
            heads: config.heads,
            scale: (config.head_dim() as f64).powf(-0.5) as f32,
        })
    }

    /// The norm that the block begins with. Whoever calls [`Self::forward`] runs it, fused with the sum before it.
    pub fn input_norm(&self) -> &LayerNorm<B> {
        &self.norm1
    }

    /// `x [N, hidden]` and its norm -> the hidden state and what is still to be added to it.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        normed: &B::Tensor,
        geometry: &B::Geometry,
    ) -> Result<(B::Tensor, B::Tensor), ExecutorError> {
        let qkv = self.qkv.forward(backend, normed)?;
        let attended = backend.segment_attention(&qkv, self.heads, geometry, self.scale)?;
        let (x, normed) = self.norm2.add_forward(backend, x, &self.output.forward(backend, &attended)?)?;
        let up = self.up.forward(backend, &normed)?;
        Ok((x, self.down.forward(backend, &backend.gelu(&up, self.gelu)?)?))
    }
}
