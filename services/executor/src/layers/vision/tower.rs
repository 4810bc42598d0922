//! The tower itself: patch embedding, interpolated positions, blocks, and mergers at the last and at some inner blocks.
//! Source: transformers `Qwen3VLVisionModel` (models.md §4.2).

use millrace_kernels::{Backend, GeluKind, PatchPage, Segments};

use super::{Merger, NormPlace, PatchGrid, VisionBlock, VisionFeatures, grid};
use crate::checkpoint::{Fields, Loader, RopeConfig};
use crate::error::ExecutorError;
use crate::layers::Linear;

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
        Ok(Self { config, patch_embed, positions, blocks, merger, deepstack })
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
        let mut x = self.embed_patches(backend, items)?;
        let geometry = self.geometry(backend, items)?;
        // In order of blocks, whatever the order of the config's list: the k-th feature goes behind decoder layer k.
        let mut deepstack = Vec::with_capacity(self.deepstack.len());
        for (index, block) in self.blocks.iter().enumerate() {
            x = block.forward(backend, &x, &geometry)?;
            let merger = self.config.deepstack.iter().position(|at| *at == index);
            if let Some(merger) = merger.and_then(|k| self.deepstack.get(k)) {
                deepstack.push(merger.forward(backend, &x)?);
            }
        }
        let all = VisionFeatures { embeddings: self.merger.forward(backend, &x)?, deepstack };
        self.split(backend, all, items)
    }

    fn embed_patches(&self, backend: &B, items: &[PatchGrid]) -> Result<B::Tensor, ExecutorError> {
        let VisionConfig { channels, patch, temporal, .. } = self.config;
        let pages: Vec<PatchPage<'_>> = items.iter().map(|item| item.page(channels, patch * patch)).collect();
        let patches = backend.patches(&pages, temporal)?;
        let (merge, side) = (self.config.merge as u32, self.config.side as u32);
        let mut index = Vec::new();
        let mut weights = Vec::new();
        for item in items {
            let (taps, shares) = grid::interpolation(item.grid_h, item.grid_w, merge, side);
            index.extend(taps);
            weights.extend(shares);
        }
        let positions = backend.interpolate_rows(&self.positions, &index, &weights)?;
        Ok(backend.add(&self.patch_embed.forward(backend, &patches)?, &positions)?)
    }

    /// Rotation of each patch and the items' extents: patches see only their own item.
    fn geometry(&self, backend: &B, items: &[PatchGrid]) -> Result<B::Geometry, ExecutorError> {
        let (mut all_cos, mut all_sin, mut segments) = (Vec::new(), Vec::new(), Segments { start: vec![0] });
        let mut end = 0;
        for item in items {
            let (merge, head_dim) = (self.config.merge as u32, self.config.head_dim());
            let (cos, sin) = grid::rotation(item.grid_h, item.grid_w, merge, head_dim, self.config.theta);
            all_cos.extend(cos);
            all_sin.extend(sin);
            end += item.grid_h * item.grid_w;
            segments.start.push(end);
        }
        Ok(backend.geometry(all_cos, all_sin, segments)?)
    }

    fn split(
        &self,
        backend: &B,
        all: VisionFeatures<B>,
        items: &[PatchGrid],
    ) -> Result<Vec<VisionFeatures<B>>, ExecutorError> {
        if items.len() == 1 {
            return Ok(vec![all]);
        }
        let merge = self.config.merge as u32;
        let mut start = 0;
        let mut features = Vec::with_capacity(items.len());
        for item in items {
            let tokens = (item.grid_h / merge) * (item.grid_w / merge);
            let rows = backend.indices((start..start + tokens).collect())?;
            features.push(all.rows(backend, &rows)?);
            start += tokens;
        }
        Ok(features)
    }
}
