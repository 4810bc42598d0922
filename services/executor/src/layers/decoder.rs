//! A stack of pre-norm decoder layers over paged caches. Which attention and which feed-forward a layer has is its own
//! affair; additions from outside (deepstack) enter between layers.

use millrace_kernels::{Backend, RopeTable, Staged};

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
        tail: Option<Tail<'_, B>>,
        cache: &mut B::KvCache,
    ) -> Result<B::Tensor, ExecutorError> {
        match self {
            Self::Grouped(attention) => attention.forward(backend, x, rope, batch, tail, cache),
            Self::Latent(attention) => {
                // A row that is alone in its batch takes another form: all of them attend together, as they are.
                let attended = attention.forward(backend, x, rope, batch, cache)?;
                tail.map_or(Ok(attended.clone()), |tail| Ok(backend.gather_rows(&attended, tail.rows)?))
            }
        }
    }
}

/// The rows of a step whose logits are wanted, and the batch that they are by themselves.
pub struct Tail<'a, B: Backend> {
    /// Rows of the step.
    pub rows: &'a B::Indices,
    /// Their extents.
    pub batch: &'a B::Batch,
}

// By hand: a derive would ask for `B: Clone`, and these are references.
impl<B: Backend> Clone for Tail<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Tail<'_, B> {}

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

    /// `x [T, H]` -> `[rows, H]` of the rows whose logits are wanted, before the final norm. `caches` holds one pool for each
    /// layer. The last layer computes nothing for other rows but keys and values, where the step has a tail and nothing is added
    /// behind that layer.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(
        &self,
        backend: &B,
        x: B::Tensor,
        rope: &RopeTable<B::Tensor>,
        staged: &Staged<B>,
        caches: &mut [B::KvCache],
        additions: &[RowAddition<B>],
    ) -> Result<B::Tensor, ExecutorError> {
        let (last, rows) = (self.layers.len().saturating_sub(1), &staged.logit_rows);
        let whole = additions.iter().any(|addition| addition.layer == last);
        let tail = staged.tail.as_ref().filter(|_| !whole).map(|batch| Tail { rows, batch });
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
            let tail = tail.filter(|_| index == last);
            let attended = layer.attention.forward(backend, &normed, rope, &staged.batch, tail, cache)?;
            if tail.is_some() {
                hidden = backend.gather_rows(&hidden, rows)?;
            }
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
        if let Some(last) = pending {
            hidden = backend.add(&hidden, &last)?;
        }
        if tail.is_some() { Ok(hidden) } else { Ok(backend.gather_rows(&hidden, rows)?) }
    }
}
