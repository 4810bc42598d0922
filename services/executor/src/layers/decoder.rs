//! A stack of pre-norm decoder layers over paged caches. Which attention and which feed-forward a layer has is its own
//! affair; additions from outside (deepstack) enter between layers.

use millrace_kernels::{Backend, RopeTable};

use super::{Attention, Ffn, LatentAttention, RmsNorm};
use crate::checkpoint::Loader;
use crate::error::ExecutorError;

/// The half of a layer in which tokens see each other.
pub enum Mixer<B: Backend> {
    /// Grouped queries over cached keys and values.
    Grouped(Attention<B>),
    /// Keys and values out of a small latent.
    Latent(LatentAttention<B>),
}

impl<B: Backend> Mixer<B> {
    fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        rope: &RopeTable<B::Tensor>,
        batch: &B::Batch,
        cache: &mut B::KvCache,
    ) -> Result<B::Tensor, ExecutorError> {
        match self {
            Self::Grouped(attention) => attention.forward(backend, x, rope, batch, cache),
            Self::Latent(attention) => attention.forward(backend, x, rope, batch, cache),
        }
    }
}

/// One layer: `h += attention(norm(h)); h += ffn(norm(h))`.
pub struct DecoderLayer<B: Backend> {
    input_norm: RmsNorm<B>,
    attention: Mixer<B>,
    post_norm: RmsNorm<B>,
    ffn: Ffn<B>,
}

impl<B: Backend> DecoderLayer<B> {
    /// `input_layernorm`, `post_attention_layernorm` and the two halves at hand.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(
        loader: &mut Loader<'_, B>,
        hidden: usize,
        eps: f32,
        attention: Mixer<B>,
        ffn: Ffn<B>,
    ) -> Result<Self, ExecutorError> {
        Ok(Self {
            input_norm: RmsNorm::load(loader, "input_layernorm", hidden, eps)?,
            post_norm: RmsNorm::load(loader, "post_attention_layernorm", hidden, eps)?,
            attention,
            ffn,
        })
    }
}

/// Something added to some rows of the hidden state behind one layer.
pub struct RowAddition<B: Backend> {
    /// Layer whose output it is added to.
    pub layer: usize,
    /// Rows of the step.
    pub rows: B::Indices,
    /// `[rows, H]`.
    pub values: B::Tensor,
}

/// The stack.
pub struct Decoder<B: Backend> {
    layers: Vec<DecoderLayer<B>>,
}

impl<B: Backend> Decoder<B> {
    /// A stack of `layers`, first to last.
    pub fn new(layers: Vec<DecoderLayer<B>>) -> Self {
        Self { layers }
    }

    /// `x [T, H]` -> `[T, H]`, before the final norm. `caches` holds one pool for each layer.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(
        &self,
        backend: &B,
        x: B::Tensor,
        rope: &RopeTable<B::Tensor>,
        batch: &B::Batch,
        caches: &mut [B::KvCache],
        additions: &[RowAddition<B>],
    ) -> Result<B::Tensor, ExecutorError> {
        let mut hidden = x;
        // The last sublayer's output, not yet added: the sum is fused with the next norm.
        let mut pending: Option<B::Tensor> = None;
        for (index, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            let normed;
            (hidden, normed) = match pending.take() {
                Some(last) => layer.input_norm.add_forward(backend, &hidden, &last)?,
                None => {
                    let normed = layer.input_norm.forward(backend, &hidden)?;
                    (hidden, normed)
                }
            };
            let attended = layer.attention.forward(backend, &normed, rope, batch, cache)?;
            let (sum, normed) = layer.post_norm.add_forward(backend, &hidden, &attended)?;
            hidden = sum;
            let mut output = Some(layer.ffn.forward(backend, &normed)?);
            for addition in additions.iter().filter(|addition| addition.layer == index) {
                if let Some(output) = output.take() {
                    hidden = backend.add(&hidden, &output)?;
                }
                hidden = backend.scatter_add_rows(&hidden, &addition.rows, &addition.values)?;
            }
            pending = output;
        }
        match pending {
            Some(last) => Ok(backend.add(&hidden, &last)?),
            None => Ok(hidden),
        }
    }
}
