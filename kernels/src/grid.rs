//! Grids of patches, as a vision tower takes them: order of patches, rotation angles, and the interpolation of a table of
//! position embeddings. Host arithmetic in f32 as transformers' `vision_utils` does it; `cuda/grid.cu` does the same.

use candle_core::Tensor;

use crate::angles::angle;
use crate::element::Element;
use crate::error::KernelError;
use crate::host::Host;
use crate::norm::PIECE_ELEMENTS;
use crate::view::{View, shape_error, tensor};

/// Grids of a vision tower's run, one behind the other. The patches of a grid stand merge block by merge block in raster order,
/// those of a block in raster order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PatchGrids {
    /// Patches down and across of each grid, multiples of `merge`.
    pub sizes: Vec<[u32; 2]>,
    /// Patches along a merge block's side.
    pub merge: u32,
}

impl PatchGrids {
    /// Prefix sums of patches, one entry more than there are grids.
    ///
    /// # Errors
    /// A side that is no multiple of `merge`, or more patches than 32 bits count.
    pub(crate) fn starts(&self, op: &'static str) -> Result<Vec<u32>, KernelError> {
        let wrong = |[h, w]: &[u32; 2]| shape_error(op, format!("a grid of {h} x {w} in blocks of {}", self.merge));
        let mut starts = vec![0u32];
        let mut end = 0u32;
        for size in &self.sizes {
            if self.merge == 0 || size.iter().any(|side| !side.is_multiple_of(self.merge)) {
                return Err(wrong(size));
            }
            let patches = size[0].checked_mul(size[1]).and_then(|patches| end.checked_add(patches));
            end = patches.filter(|end| *end <= i32::MAX as u32).ok_or_else(|| wrong(size))?;
            starts.push(end);
        }
        Ok(starts)
    }

    /// (row, column) of every patch, and the size of its grid.
    fn places(&self) -> impl Iterator<Item = ([u32; 2], [u32; 2])> + '_ {
        let merge = self.merge.max(1);
        let of = move |size: [u32; 2]| {
            let blocks = (0..size[0] / merge).flat_map(move |y| (0..size[1] / merge).map(move |x| [y, x]));
            blocks.flat_map(move |[y, x]| {
                let within = (0..merge).flat_map(move |row| (0..merge).map(move |col| [row, col]));
                within.map(move |[row, col]| ([y * merge + row, x * merge + col], size))
            })
        };
        self.sizes.iter().copied().flat_map(of)
    }
}

/// cos and sin `[patches, 2 * inverse.len()]` of a 2-D rotation: every frequency turns with the row, then with the column.
pub(crate) fn rotation(grids: &PatchGrids, inverse: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let longest = grids.sizes.as_flattened().iter().copied().max().unwrap_or(0);
    let all = (0..longest).flat_map(|position| inverse.iter().map(move |frequency| angle(position, *frequency)));
    let (cos_table, sin_table): (Vec<f32>, Vec<f32>) = all.unzip();
    let patches: usize = grids.sizes.iter().map(|[h, w]| *h as usize * *w as usize).sum();
    let width = inverse.len();
    let mut cos = Vec::with_capacity(2 * patches * width);
    let mut sin = Vec::with_capacity(2 * patches * width);
    for (place, _) in grids.places() {
        for position in place {
            let at = position as usize * width;
            cos.extend_from_slice(&cos_table[at..at + width]);
            sin.extend_from_slice(&sin_table[at..at + width]);
        }
    }
    (cos, sin)
}

/// The two taps of one axis and their weights: position `index` of `size`, stretched over a table of `side` entries with
/// corners aligned.
fn taps(index: u32, size: u32, side: u32) -> [(u32, f32); 2] {
    let source = index as f32 * (side - 1) as f32 / size.saturating_sub(1).max(1) as f32;
    let floor = source.floor();
    [0u32, 1].map(|offset| {
        let distance = (source - floor - offset as f32).abs();
        ((floor as u32 + offset).min(side - 1), (1.0 - distance).max(0.0))
    })
}

/// The table's four entries around a patch and their weights: (row above, row below) x (left, right).
fn corners([row, col]: [u32; 2], [h, w]: [u32; 2], side: u32) -> [(u32, f32); 4] {
    let ([top, bottom], [left, right]) = (taps(row, h, side), taps(col, w, side));
    [(top, left), (top, right), (bottom, left), (bottom, right)].map(|(y, x)| (y.0 * side + x.0, y.1 * x.1))
}

/// Entries along a side of a square table of `count`.
pub(crate) fn side(op: &'static str, count: usize) -> Result<u32, KernelError> {
    let side = count.isqrt();
    match u32::try_from(side) {
        Ok(small) if side > 0 && side * side == count => Ok(small),
        _ => Err(shape_error(op, format!("a table of {count} rows is not square"))),
    }
}

/// See [`crate::Backend::interpolate_grids`].
pub(crate) fn interpolate<E: Element + Send + Sync>(
    host: &Host,
    table: &Tensor,
    grids: &PatchGrids,
) -> Result<Tensor, KernelError> {
    let op = "interpolate_grids";
    let table = View::<E>::new(op, table)?;
    let (count, width) = table.matrix()?;
    let side = side(op, count)?;
    let places: Vec<_> = grids.places().collect();
    let source = table.data()?;
    let mut out = vec![E::default(); places.len() * width];
    let rows = (PIECE_ELEMENTS / width.max(1)).max(1);
    host.threads.for_pieces(&mut out, rows * width.max(1), |index, out| {
        for ((place, size), out) in places[index * rows..].iter().zip(out.chunks_exact_mut(width)) {
            let corners = corners(*place, *size, side);
            let [a, b, c, d] = corners.map(|(at, _)| &source[at as usize * width..][..width]);
            let w = corners.map(|(_, weight)| weight);
            for (column, out) in out.iter_mut().enumerate() {
                let sum = w[0] * a[column].widen() + w[1] * b[column].widen() + w[2] * c[column].widen();
                *out = E::narrow(sum + w[3] * d[column].widen());
            }
        }
    });
    tensor(out, &[places.len(), width])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grids(sizes: &[[u32; 2]], merge: u32) -> PatchGrids {
        PatchGrids { sizes: sizes.to_vec(), merge }
    }

    #[test]
    fn patches_go_block_by_block() {
        let order: Vec<[u32; 2]> = grids(&[[4, 6], [2, 2]], 2).places().map(|(place, _)| place).collect();
        assert_eq!(order[..6], [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]);
        assert_eq!(order[12..14], [[2, 0], [2, 1]]);
        assert_eq!(order[24..], [[0, 0], [0, 1], [1, 0], [1, 1]]);
    }

    #[test]
    fn starts_count_patches_of_whole_blocks() {
        assert_eq!(grids(&[[4, 6], [0, 2], [2, 2]], 2).starts("test").unwrap(), [0, 24, 24, 28]);
        assert!(grids(&[[3, 4]], 2).starts("test").is_err());
        assert!(grids(&[[3, 4]], 0).starts("test").is_err());
        assert!(grids(&[[1 << 16, 1 << 15]], 1).starts("test").is_err());
    }

    #[test]
    fn corners_of_the_grid_meet_corners_of_the_table() {
        let at = |place| corners(place, [4, 4], 7);
        assert_eq!(at([0, 0]).map(|(_, weight)| weight), [1.0, 0.0, 0.0, 0.0]);
        assert_eq!((at([0, 0])[0].0, at([3, 3])[0]), (0, (48, 1.0)));
        let all = grids(&[[4, 4]], 2).places().map(|(place, size)| corners(place, size, 7)).collect::<Vec<_>>();
        assert!(all.iter().all(|four| (four.iter().map(|(_, weight)| weight).sum::<f32>() - 1.0).abs() < 1e-6));
        // Row 1 of 4 lies at 2, column 1 of 4 at 2: an entry of the table itself.
        assert_eq!(at([1, 1])[0], (2 * 7 + 2, 1.0));
    }

    #[test]
    fn a_single_row_sits_at_the_top() {
        assert_eq!(taps(0, 1, 48)[0], (0, 1.0));
        assert_eq!(taps(1, 3, 4), [(1, 0.5), (2, 0.5)]);
    }

    #[test]
    fn rows_turn_the_first_half_and_columns_the_second() {
        let (cos, sin) = rotation(&grids(&[[2, 2]], 2), &[1.0, 0.01]);
        assert_eq!(cos.len(), 4 * 4);
        assert_eq!(sin[4..8], [0.0, 0.0, 1f64.sin() as f32, angle(1, 0.01).1]);
    }
}
