//! Launches of `grid.cu`: what a run of a vision tower needs of its patch grids.

use super::CudaBackend;
use super::driver::{Argument, Launch};
use super::tensor::{CudaGeometry, CudaTensor};
use super::{attention, tiles};
use crate::backend::Segments;
use crate::error::KernelError;
use crate::grid::{self, PatchGrids};
use crate::view::shape_error;

/// Rows of a tile where no kernel takes tiles.
const ANY_TILE_ROWS: usize = 64;
/// Bytes of a word.
const WORD: usize = 4;

impl CudaBackend {
    /// See [`crate::Backend::geometry`].
    pub(super) fn make_geometry(
        &self,
        grids: &PatchGrids,
        inverse: &[f32],
        segments: Segments,
    ) -> Result<CudaGeometry, KernelError> {
        let op = "geometry";
        let (starts, segments) = (grids.starts(op)?, segments.start);
        let patches = starts.last().copied().unwrap_or(0);
        let spans = segments.first() == Some(&0) && segments.windows(2).all(|pair| pair[0] <= pair[1]);
        if !spans || segments.last() != Some(&patches) {
            return Err(shape_error(op, format!("segment starts {segments:?} for {patches} patches")));
        }
        // Sizes are read two words at once.
        let sizes = starts.len().next_multiple_of(2);
        let mut words = starts;
        words.resize(sizes, 0);
        words.extend(grids.sizes.as_flattened());
        let frequencies = words.len();
        words.extend(inverse.iter().map(|frequency| frequency.to_bits()));
        // A kernel takes tiles of its own size, and which one it will be follows from the head: four angles for a frequency.
        let segment = attention::segment_kernel(4 * inverse.len(), self.driver.capability);
        let list = tiles::segments(&segments, segment.map_or(ANY_TILE_ROWS, |kernel| kernel.tile_rows));
        let staged = self.staged(&words)?;
        let (start, tiles) = (self.staged(&segments)?, self.staged(list.as_flattened())?);
        let [count, patches, merge] = [grids.sizes.len(), patches as usize, grids.merge as usize];
        let angles = patches * 2 * inverse.len();
        let (cos, sin) = (self.memory.piece(angles * size_of::<f32>())?, self.memory.piece(angles * size_of::<f32>())?);
        let at = |word: usize| staged.pointer + (word * WORD) as u64;
        let arguments = [
            Argument::Pointer(staged.pointer),
            Argument::Pointer(at(sizes)),
            Argument::Pointer(at(frequencies)),
            Argument::Pointer(cos.pointer),
            Argument::Pointer(sin.pointer),
            Argument::Int(count as i32),
            Argument::Int(merge as i32),
            Argument::Int(inverse.len() as i32),
            Argument::Size(angles as u64),
        ];
        self.driver.launch("patch_angles", Launch::rows(angles.div_ceil(128), 128).alone(), &arguments)?;
        let sizes = at(sizes);
        Ok(CudaGeometry {
            cos,
            sin,
            start,
            list: tiles,
            tiles: list.len(),
            angles,
            grids: staged,
            sizes,
            grid_counts: [count, patches, merge],
            segments,
        })
    }

    /// See [`crate::Backend::interpolate_grids`].
    pub(super) fn interpolate(&self, table: &CudaTensor, geometry: &CudaGeometry) -> Result<CudaTensor, KernelError> {
        let op = "interpolate_grids";
        let (rows, width) = table.matrix(op)?;
        let side = grid::side(op, rows)?;
        let [count, patches, merge] = geometry.grid_counts;
        let out = self.activation(&[patches, width])?;
        let arguments = [
            table.argument(),
            Argument::Pointer(geometry.grids.pointer),
            Argument::Pointer(geometry.sizes),
            out.argument(),
            Argument::Int(count as i32),
            Argument::Int(merge as i32),
            Argument::Int(side as i32),
            Argument::Int(width as i32),
        ];
        self.driver.launch(op, Launch::rows(patches, 128).alone(), &arguments)?;
        Ok(out)
    }
}
