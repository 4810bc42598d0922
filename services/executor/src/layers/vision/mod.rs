//! The vision tower of Qwen3-VL: patches of images (or temporal groups of frames) in, merged features out.

mod block;
mod merger;
mod tower;

pub use block::VisionBlock;
pub use merger::{Merger, NormPlace};
pub use tower::{VisionConfig, VisionTower};

use std::ops::Range;

use candle_core::DType;
use millrace_kernels::{Backend, PatchPage};
use millrace_protocol::PageDtype;
use millrace_protocol::ready::Normalise;

/// Patches of one item, in the reference's patch order.
#[derive(Clone, PartialEq)]
pub struct PatchGrid {
    /// Patches down.
    pub grid_h: u32,
    /// Patches across.
    pub grid_w: u32,
    /// Pixels `[grid_h * grid_w, channels, slots, p * p]`, little-endian: normalised, or samples of one byte.
    pub bytes: bytes::Bytes,
    /// Their type.
    pub dtype: PageDtype,
    /// Frames stored of each patch: 1 for a still.
    pub slots: usize,
    /// What normalises samples.
    pub normalise: Option<Normalise>,
}

impl PatchGrid {
    /// The same for the backend, with the model's channels and pixels of a patch.
    fn page(&self, channels: usize, area: usize) -> PatchPage<'_> {
        let dtype = match self.dtype {
            PageDtype::F32 => DType::F32,
            PageDtype::Bf16 => DType::BF16,
            PageDtype::U8 => DType::U8,
        };
        let rows = self.grid_h as usize * self.grid_w as usize;
        let normalise = self.normalise.map(|Normalise { mean, std }| (mean, std));
        PatchPage { bytes: &self.bytes, dtype, rows, channels, slots: self.slots, area, normalise }
    }
}

/// What the tower gives for one item or several: one row for each placeholder token.
pub struct VisionFeatures<B: Backend> {
    /// Replaces the placeholders' embeddings, `[tokens, H]`.
    pub embeddings: B::Tensor,
    /// Added behind the first decoder layers, `[tokens, H]` each.
    pub deepstack: Vec<B::Tensor>,
}

// By hand: a derive would ask for `B: Clone`, and only tensors are cloned (their storage is shared).
impl<B: Backend> Clone for VisionFeatures<B> {
    fn clone(&self) -> Self {
        Self { embeddings: self.embeddings.clone(), deepstack: self.deepstack.clone() }
    }
}

impl<B: Backend> VisionFeatures<B> {
    /// Every part, the embeddings first.
    pub fn parts(&self) -> impl Iterator<Item = &B::Tensor> {
        std::iter::once(&self.embeddings).chain(&self.deepstack)
    }

    /// The same elements in memory for what outlives a step.
    ///
    /// # Errors
    /// The device has no room.
    pub fn keep(&self, backend: &B) -> Result<Self, millrace_kernels::KernelError> {
        let deepstack = self.deepstack.iter().map(|part| backend.keep(part)).collect::<Result<_, _>>()?;
        Ok(Self { embeddings: backend.keep(&self.embeddings)?, deepstack })
    }

    /// The same rows of every part; they stay where they are.
    ///
    /// # Errors
    /// A row outside the features.
    pub fn row_range(&self, backend: &B, rows: Range<usize>) -> Result<Self, millrace_kernels::KernelError> {
        let pick = |x: &B::Tensor| backend.row_range(x, rows.clone());
        Ok(Self {
            embeddings: pick(&self.embeddings)?,
            deepstack: self.deepstack.iter().map(pick).collect::<Result<_, _>>()?,
        })
    }

    /// `parts` one below the other; `None` if there are none.
    ///
    /// # Errors
    /// Parts of different models.
    pub fn concat(backend: &B, mut parts: Vec<Self>) -> Result<Option<Self>, millrace_kernels::KernelError> {
        if parts.len() < 2 {
            return Ok(parts.pop());
        }
        let levels = parts.first().map_or(0, |part| part.deepstack.len());
        let embeddings: Vec<_> = parts.iter().map(|part| part.embeddings.clone()).collect();
        let mut deepstack = Vec::with_capacity(levels);
        for level in 0..levels {
            let tensors: Vec<_> = parts.iter().filter_map(|part| part.deepstack.get(level).cloned()).collect();
            deepstack.push(backend.concat_rows(&tensors)?);
        }
        Ok(Some(Self { embeddings: backend.concat_rows(&embeddings)?, deepstack }))
    }
}
