//! `interpolate_grids` against f64, and what `geometry` refuses. Rotation angles are held in `segment_attention.rs`.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use millrace_kernels::{Backend, PatchGrids, Segments};
use support::{Random, assert_as_good_as, assert_refused, backends, round};

/// Where patch `index` of a grid lies in a table of `side` entries along each axis: f64, plain arithmetic.
fn place(index: usize, size: u32, side: usize) -> f64 {
    index as f64 * (side - 1) as f64 / f64::from(size.max(2) - 1)
}

#[test]
fn interpolation_agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (side, width, merge, sizes) in [
            (1, 3, 1, vec![[1, 1], [2, 3]]),
            (7, 1, 2, vec![[4, 4]]),
            (48, 33, 2, vec![[6, 10], [2, 2], [0, 4], [46, 80]]),
            (5, 128, 3, vec![[3, 15]]),
        ] {
            let table = random.values(dtype, side * side * width);
            let mut exact = Vec::new();
            for &[h, w] in &sizes {
                for block in 0..h * w / (merge * merge) {
                    for inner in 0..merge * merge {
                        let row = block / (w / merge) * merge + inner / merge;
                        let column = block % (w / merge) * merge + inner % merge;
                        let (y, x) = (place(row as usize, h, side), place(column as usize, w, side));
                        let (top, left) = (y.floor() as usize, x.floor() as usize);
                        let at = |row: usize, column: usize, i: usize| {
                            f64::from(table[(row.min(side - 1) * side + column.min(side - 1)) * width + i])
                        };
                        for i in 0..width {
                            let above = at(top, left, i) * (1.0 - x.fract()) + at(top, left + 1, i) * x.fract();
                            let below = at(top + 1, left, i) * (1.0 - x.fract()) + at(top + 1, left + 1, i) * x.fract();
                            exact.push(above * (1.0 - y.fract()) + below * y.fract());
                        }
                    }
                }
            }
            let plain: Vec<f32> = exact.iter().map(|&v: &f64| round(dtype, v as f32)).collect();
            // Taps are f32: a place of up to 47 is known to 2e-6, and so are the weights.
            let slack = 1e-5 * table.iter().fold(0f32, |most, v| most.max(v.abs()));
            let table = backend.upload(&table, &[side * side, width]).unwrap();
            let patches = sizes.iter().map(|[h, w]| h * w).sum();
            let grids = PatchGrids { sizes, merge };
            let geometry = backend.geometry(&grids, &[1.0], Segments { start: vec![0, patches] }).unwrap();
            let y = backend.interpolate_grids(&table, &geometry).unwrap();
            assert_eq!(backend.shape(&y), [patches as usize, width]);
            let ours = backend.to_host(&y).unwrap();
            if dtype == candle_core::DType::BF16 {
                assert_as_good_as(&label, &ours, &plain, &exact);
            } else {
                let far = ours.iter().zip(&exact).find(|(a, b)| (f64::from(**a) - **b).abs() > f64::from(slack));
                assert_eq!(far, None, "{label}");
            }
        }
    }
}

#[test]
fn grids_and_segments_must_agree() {
    for (_, backend) in backends() {
        let run = |sizes: &[[u32; 2]], merge, start: &[u32]| {
            let grids = PatchGrids { sizes: sizes.to_vec(), merge };
            backend.geometry(&grids, &[1.0], Segments { start: start.to_vec() })
        };
        assert!(run(&[[2, 4]], 2, &[0, 3, 8]).is_ok());
        assert_refused(run(&[[2, 3]], 2, &[0, 6]), "geometry");
        assert_refused(run(&[[2, 4]], 0, &[0, 8]), "geometry");
        for start in [vec![], vec![0, 7], vec![0, 9], vec![1, 8], vec![0, 5, 4, 8]] {
            assert_refused(run(&[[2, 4]], 2, &start), "geometry");
        }
        let geometry = run(&[[2, 2]], 2, &[0, 4]).unwrap();
        let table = |rows: usize| backend.upload(&vec![0.0; rows * 2], &[rows, 2]).unwrap();
        assert_refused(backend.interpolate_grids(&table(8), &geometry), "interpolate_grids");
        assert_refused(backend.interpolate_grids(&table(0), &geometry), "interpolate_grids");
    }
}
