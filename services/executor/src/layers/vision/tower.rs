//! The tower itself: patch embedding, interpolated positions, blocks, and mergers at the last and at some inner blocks.
//! Source: transformers `Qwen3VLVisionModel` (models.md §4.2).

use millrace_kernels::{Backend, GeluKind, PatchGrids, PatchPage, Segments};

use super::{Merger, NormPlace, PatchGrid, VisionBlock, VisionFeatures};
use crate::checkpoint::{Fields, Loader, RopeConfig};
use crate::error::ExecutorError;
use crate::layers::{Linear, rope};

/// Of every layer norm here; a constant of the reference.
pub(super) const NORM_EPS: f32 = 1e-6;

/// Sizes of the tower.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Size of a patch's row.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Size inside the blocks' MLPs.
    pub intermediate: usize,
    /// Blocks.
    pub depth: usize,
    /// Colour channels.
    pub channels: usize,
    /// Pixels along a patch's side.
    pub patch: usize,
    /// Frames of a patch.
    pub temporal: usize,
    /// Patches along a merged row's side.
    pub merge: usize,
    /// Entries along the side of the table of positions.
    pub side: usize,
    /// Size of a merged row: the language model's hidden size.
    pub output: usize,
    /// Deepstack merger k reads the output of block `deepstack[k]`.
    pub deepstack: Vec<usize>,
    /// Activation inside the blocks.
    pub gelu: GeluKind,
    /// Base of the rotation's frequencies.
    pub theta: f64,
}

impl VisionConfig {
    /// Reads `vision_config`; what is absent has the default of `Qwen3VLVisionConfig`.
    ///
    /// # Errors
    /// A value of the wrong kind, sizes that do not divide, or a part that is not supported.
    pub fn read(fields: &Fields<'_>) -> Result<Self, ExecutorError> {
        let gelu = match fields.text("hidden_act")?.unwrap_or("gelu_pytorch_tanh") {
            "gelu_pytorch_tanh" => GeluKind::Tanh,
            "gelu" => GeluKind::Erf,
            other => return Err(ExecutorError::Unsupported(format!("`{}` = \"{other}\"", fields.key("hidden_act")))),
        };
        let config = Self {
            hidden: fields.size("hidden_size", 1152)?,
            heads: fields.size("num_heads", 16)?,
            intermediate: fields.size("intermediate_size", 4304)?,
            depth: fields.size("depth", 27)?,
            channels: fields.size("in_channels", 3)?,
            patch: fields.size("patch_size", 16)?,
            temporal: fields.size("temporal_patch_size", 2)?,
            merge: fields.size("spatial_merge_size", 2)?,
            side: fields.size("num_position_embeddings", 2304)?.isqrt(),
            output: fields.size("out_hidden_size", 3584)?,
            deepstack: fields.sizes("deepstack_visual_indexes", &[8, 16, 24])?,
            gelu,
            theta: RopeConfig::read(fields, "axial", 10_000.0)?.theta,
        };
        if !config.hidden.is_multiple_of(config.heads) || !config.head_dim().is_multiple_of(4) {
            let what = format!("= {} does not divide {} into heads of 4n elements", config.heads, config.hidden);
            return Err(fields.error("num_heads", what));
        }
        if let Some(block) = config.deepstack.iter().find(|block| **block >= config.depth) {
            let what = format!("names block {block} of {}", config.depth);
            return Err(fields.error("deepstack_visual_indexes", what));
        }
        Ok(config)
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Elements of a patch: channels x frames x pixels.
    pub fn patch_elements(&self) -> usize {
        self.channels * self.temporal * self.patch * self.patch
    }
}

/// The tower's weights.
pub struct VisionTower<B: Backend> {
    config: VisionConfig,
    patch_embed: Linear<B>,
    positions: B::Tensor,
    /// Frequencies of the rotation: half of a head's pairs turn with the row, half with the column.
    inverse: Vec<f32>,
    blocks: Vec<VisionBlock<B>>,
    merger: Merger<B>,
    deepstack: Vec<Merger<B>>,
}

impl<B: Backend> VisionTower<B> {
    /// Everything below the loader's prefix.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, config: VisionConfig) -> Result<Self, ExecutorError> {
        let VisionConfig { hidden, channels, temporal, patch, side, .. } = config;
        let kernel = [hidden, channels, temporal, patch, patch];
        let mut proj = loader.below("patch_embed.proj");
        // The convolution's stride is its kernel, so that it is a GEMM over flattened patches.
        let weight = proj.reshaped("weight", &kernel, &[hidden, config.patch_elements()])?;
        let patch_embed = Linear::from_parts(weight, Some(proj.tensor("bias", &[hidden])?));
        let positions = loader.tensor("pos_embed.weight", &[side * side, hidden])?;
        let blocks = (0..config.depth).map(|n| VisionBlock::load(&mut loader.below(format!("blocks.{n}")), &config));
        let blocks = blocks.collect::<Result<_, _>>()?;
        let merger = Merger::load(&mut loader.below("merger"), &config, NormPlace::Patch)?;
        let mut deepstack = Vec::new();
        for k in 0..config.deepstack.len() {
            let mut own = loader.below(format!("deepstack_merger_list.{k}"));
            deepstack.push(Merger::load(&mut own, &config, NormPlace::Merged)?);
        }
        let inverse = rope::inverse_frequencies(config.theta, config.head_dim() / 2);
        Ok(Self { config, patch_embed, positions, inverse, blocks, merger, deepstack })
    }

    /// Sizes.
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// Features of each item. Items are computed together but do not see each other.
    ///
    /// # Errors
    /// Pixels that do not fill their grid.
    pub fn encode(&self, backend: &B, items: &[PatchGrid]) -> Result<Vec<VisionFeatures<B>>, ExecutorError> {
        let geometry = self.geometry(backend, items)?;
        let mut x = self.embed_patches(backend, items, &geometry)?;
        let norm = |block: &VisionBlock<B>| block.input_norm().forward(backend, &x);
        let mut normed = self.blocks.first().map(norm).transpose()?;
        // In order of blocks, whatever the order of the config's list: the k-th feature goes behind decoder layer k.
        let mut deepstack = Vec::with_capacity(self.deepstack.len());
        for (index, block) in self.blocks.iter().enumerate() {
            let Some(input) = normed.take() else { break };
            let (attended, output) = block.forward(backend, &x, &input, &geometry)?;
            match self.blocks.get(index + 1) {
                Some(next) => {
                    let (sum, norm) = next.input_norm().add_forward(backend, &attended, &output)?;
                    (x, normed) = (sum, Some(norm));
                }
                None => x = backend.add(&attended, &output)?,
            }
            let merger = self.config.deepstack.iter().position(|at| *at == index);
            if let Some(merger) = merger.and_then(|k| self.deepstack.get(k)) {
                deepstack.push(merger.forward(backend, &x)?);
            }
        }
        let all = VisionFeatures { embeddings: self.merger.forward(backend, &x)?, deepstack };
        self.split(backend, &all, items)
    }

    fn embed_patches(
        &self,
        backend: &B,
        items: &[PatchGrid],
        geometry: &B::Geometry,
    ) -> Result<B::Tensor, ExecutorError> {
        let VisionConfig { channels, patch, temporal, .. } = self.config;
        let pages: Vec<PatchPage<'_>> = items.iter().map(|item| item.page(channels, patch * patch)).collect();
        let patches = backend.patches(&pages, temporal)?;
        let positions = backend.interpolate_grids(&self.positions, geometry)?;
        Ok(backend.add(&self.patch_embed.forward(backend, &patches)?, &positions)?)
    }

    /// Where the patches lie, and the items' extents: patches see only their own item.
    fn geometry(&self, backend: &B, items: &[PatchGrid]) -> Result<B::Geometry, ExecutorError> {
        let sizes = items.iter().map(|item| [item.grid_h, item.grid_w]).collect();
        let grids = PatchGrids { sizes, merge: self.config.merge as u32 };
        let mut end = 0;
        let ends = items.iter().map(|item| {
            end += item.grid_h * item.grid_w;
            end
        });
        let segments = Segments { start: std::iter::once(0).chain(ends).collect() };
        Ok(backend.geometry(&grids, &self.inverse, segments)?)
    }

    fn split(
        &self,
        backend: &B,
        all: &VisionFeatures<B>,
        items: &[PatchGrid],
    ) -> Result<Vec<VisionFeatures<B>>, ExecutorError> {
        let merge = self.config.merge as u32;
        let mut end = 0;
        let own = |item: &PatchGrid| {
            let start = end;
            end += ((item.grid_h / merge) * (item.grid_w / merge)) as usize;
            Ok(all.row_range(backend, start..end)?)
        };
        items.iter().map(own).collect()
    }
}
