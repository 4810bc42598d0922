//! Geometry of a patch grid: order of patches, position embedding taps, rotation angles. Host arithmetic in f32 as
//! transformers' `vision_utils` does it. Pure functions.

use millrace_kernels::angle;

use crate::layers::rope::inverse_frequencies;

/// (row, column) of each patch of a `grid_h x grid_w` grid: merge blocks in raster order, and within a block its patches in
/// raster order.
pub fn patch_order(grid_h: u32, grid_w: u32, merge: u32) -> Vec<(u32, u32)> {
    let mut order = Vec::with_capacity(grid_h as usize * grid_w as usize);
    for block_row in 0..grid_h / merge {
        for block_col in 0..grid_w / merge {
            for row in 0..merge {
                for col in 0..merge {
                    order.push((block_row * merge + row, block_col * merge + col));
                }
            }
        }
    }
    order
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

/// Bilinear taps of each patch into a `side x side` table of position embeddings: (row above, row below) x (left, right).
pub fn interpolation(grid_h: u32, grid_w: u32, merge: u32, side: u32) -> (Vec<[u32; 4]>, Vec<[f32; 4]>) {
    let order = patch_order(grid_h, grid_w, merge);
    let patch = |(row, col): (u32, u32)| {
        let ([top, bottom], [left, right]) = (taps(row, grid_h, side), taps(col, grid_w, side));
        let pairs = [(top, left), (top, right), (bottom, left), (bottom, right)];
        (pairs.map(|(y, x)| y.0 * side + x.0), pairs.map(|(y, x)| y.1 * x.1))
    };
    order.into_iter().map(patch).unzip()
}

/// cos and sin `[patches, head_dim / 2]` of the tower's 2-D rotation: the first half of the frequencies turns with the row,
/// the second with the column.
pub fn rotation(grid_h: u32, grid_w: u32, merge: u32, head_dim: usize, theta: f64) -> (Vec<f32>, Vec<f32>) {
    let inverse = inverse_frequencies(theta, head_dim / 2);
    let width = inverse.len();
    let angles = |position: u32| inverse.iter().map(move |frequency| angle(position, *frequency));
    let table: Vec<(f32, f32)> = (0..grid_h.max(grid_w)).flat_map(angles).collect();
    let of = |position: u32| table.iter().skip(position as usize * width).take(width).copied();
    patch_order(grid_h, grid_w, merge).into_iter().flat_map(|(row, col)| of(row).chain(of(col))).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_go_block_by_block() {
        let order = patch_order(4, 6, 2);
        assert_eq!(order[..6], [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3)]);
        assert_eq!(order[12..14], [(2, 0), (2, 1)]);
        assert_eq!(order.len(), 24);
    }

    #[test]
    fn corners_of_the_grid_meet_corners_of_the_table() {
        let (index, weights) = interpolation(4, 4, 2, 7);
        assert_eq!((index[0][0], weights[0]), (0, [1.0, 0.0, 0.0, 0.0]));
        assert_eq!((index[15][0], weights[15]), (48, [1.0, 0.0, 0.0, 0.0]));
        assert!(weights.iter().all(|w| (w.iter().sum::<f32>() - 1.0).abs() < 1e-6));
        // Row 1 of 4 lies at 2, column 1 of 4 at 2: an entry of the table itself.
        assert_eq!((index[3][0], weights[3][0]), (2 * 7 + 2, 1.0));
    }

    #[test]
    fn a_single_row_sits_at_the_top() {
        assert_eq!(taps(0, 1, 48)[0], (0, 1.0));
        assert_eq!(taps(1, 3, 4), [(1, 0.5), (2, 0.5)]);
    }

    #[test]
    fn rows_turn_the_first_half_and_columns_the_second() {
        let (cos, sin) = rotation(2, 2, 2, 8, 1e4);
        assert_eq!(cos.len(), 4 * 4);
        assert_eq!(sin[4..8], [0.0, 0.0, 1f64.sin() as f32, angle(1, inverse_frequencies(1e4, 4)[1]).1]);
    }
}
