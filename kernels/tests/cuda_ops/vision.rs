//! The vision tower's ops on CUDA against their CPU twins: patches out of pages, attention within segments, grids.

use candle_core::DType;
use millrace_kernels::{Backend, PatchGrids, PatchPage, Segments};

use super::B;
use super::device::{Op, compare, device, poison};
use super::support::{Random, assert_refused, samples};

struct Pages {
    pages: Vec<(usize, usize, DType, Vec<u8>)>,
}

impl Op for Pages {
    fn run<D: Backend>(&self, d: &D) -> Vec<f32> {
        let pages: Vec<PatchPage<'_>> = self
            .pages
            .iter()
            .map(|(rows, slots, dtype, bytes)| PatchPage {
                bytes,
                dtype: *dtype,
                rows: *rows,
                channels: 3,
                slots: *slots,
                area: 9,
                normalise: None,
            })
            .collect();
        d.to_host(&d.patches(&pages, 2).unwrap()).unwrap()
    }
}

#[test]
fn patches_come_as_their_pages_hold_them() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    let mut pages = Vec::new();
    for (rows, slots, dtype) in [(4, 1, B), (16, 2, B), (4, 1, DType::F32), (8, 2, DType::F32)] {
        let values = random.values(B, rows * 3 * slots * 9);
        let bytes = match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        };
        pages.push((rows, slots, dtype, bytes));
    }
    compare("pages", &cuda, &Pages { pages });
    // More than one buffer holds (16 MiB), twice: the second time the first buffer is used again.
    let large = |rows: usize, slots: usize| {
        let bytes =
            (0..rows * 3 * slots * 9).flat_map(|i| half::bf16::from_f32((i % 251) as f32).to_le_bytes()).collect();
        (rows, slots, B, bytes)
    };
    for _ in 0..2 {
        compare("large pages", &cuda, &Pages { pages: vec![large(9, 1), large(160_001, 2), large(40_000, 1)] });
    }
    let short = PatchPage { bytes: &[0; 3], dtype: B, rows: 1, channels: 1, slots: 1, area: 2, normalise: None };
    assert_refused(cuda.patches(&[short], 2), "patches");
}

/// Pages of samples among normalised ones: exactly what pages of the same values give that were normalised before.
#[test]
fn samples_are_normalised_to_the_bit() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    // 256 and 196: patches of 16 and 14 pixels. The last page takes more than one buffer (16 MiB), and more blocks than one run.
    for (area, temporal, pages) in [
        (256, 2, vec![(4, 1), (1, 2), (33, 1), (64, 2), (0, 1)]),
        (196, 2, vec![(3, 1), (5, 2)]),
        (9, 3, vec![(1, 3), (7, 1), (16, 3)]),
        (256, 2, vec![(1, 1), (12_001, 2), (23_000, 1)]),
    ] {
        let made: Vec<_> = pages.iter().map(|&(rows, slots)| samples(&mut random, rows, slots, area)).collect();
        let before = |values: &[f32]| values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        let normalised: Vec<Vec<u8>> = made.iter().map(|(_, _, values)| before(values)).collect();
        let page = |n: usize, as_samples: bool| {
            let (rows, slots) = pages[n];
            let (bytes, dtype, normalise) =
                if as_samples { (&made[n].0, DType::U8, Some(made[n].1)) } else { (&normalised[n], B, None) };
            PatchPage { bytes, dtype, rows, channels: 3, slots, area, normalise }
        };
        let run = |as_samples: &dyn Fn(usize) -> bool| -> Vec<u32> {
            poison(&cuda, pages.iter().map(|(rows, _)| rows).sum::<usize>() * 3 * temporal * area);
            let pages: Vec<PatchPage<'_>> = (0..pages.len()).map(|n| page(n, as_samples(n))).collect();
            cuda.to_host(&cuda.patches(&pages, temporal).unwrap()).unwrap().into_iter().map(f32::to_bits).collect()
        };
        let wanted = run(&|_| false);
        assert!(run(&|_| true) == wanted, "area {area}: samples");
        assert!(run(&|n| n % 2 == 0) == wanted, "area {area}: samples and normalised pages");
    }
    let grey = PatchPage {
        bytes: &[0; 8],
        dtype: DType::U8,
        rows: 1,
        channels: 1,
        slots: 1,
        area: 8,
        normalise: Some(([0.5; 3], [0.5; 3])),
    };
    assert_refused(cuda.patches(&[grey], 2), "patches");
}

struct Vision {
    heads: usize,
    rows: usize,
    qkv: Vec<f32>,
    grids: PatchGrids,
    inverse: Vec<f32>,
    segments: Segments,
    /// Position embeddings `[side * side, width]`.
    table: Vec<f32>,
    side: usize,
}

impl Op for Vision {
    fn run<D: Backend>(&self, b: &D) -> Vec<f32> {
        let qkv = b.upload(&self.qkv, &[self.rows, self.qkv.len() / self.rows]).unwrap();
        let table = b.upload(&self.table, &[self.side * self.side, self.table.len() / self.side.pow(2)]).unwrap();
        let geometry = b.geometry(&self.grids, &self.inverse, self.segments.clone()).unwrap();
        let mut values = b.to_host(&b.segment_attention(&qkv, self.heads, &geometry, 0.125).unwrap()).unwrap();
        values.extend(b.to_host(&b.interpolate_grids(&table, &geometry).unwrap()).unwrap());
        values
    }
}

#[test]
fn segments_attend_alone_and_grids_are_interpolated() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    let many = vec![[1, 1], [1, 2], [7, 9], [8, 8], [127, 1], [8, 16], [3, 43]];
    for (heads, d) in [(2, 64), (16, 64), (1, 4), (3, 20), (2, 72), (1, 80)] {
        for (merge, start, sizes) in [
            (1, vec![0, 1, 1, 18, 50, 87], vec![[1, 1], [0, 5], [1, 17], [4, 8], [37, 1]]),
            (1, vec![0, 1, 3, 66, 130, 257, 385, 514], many.clone()),
            (2, vec![0, 64, 200], vec![[8, 8], [4, 34]]),
            (3, vec![0, 513], vec![[27, 18], [3, 9]]),
        ] {
            let rows = start[start.len() - 1] as usize;
            let qkv = random.values(B, rows * 3 * heads * d);
            let inverse = (0..d / 4).map(|i| 1e4f32.powf(-4.0 * i as f32 / d as f32)).collect();
            let (side, width) = (1 + random.below(48), [7, 64, 1024][merge as usize - 1]);
            let table = random.values(B, side * side * width);
            let (grids, segments) = (PatchGrids { sizes, merge }, Segments { start });
            let label = format!("{heads} heads of {d}, {grids:?}, table of {side}");
            compare(&label, &cuda, &Vision { heads, rows, qkv, grids, inverse, segments, table, side });
        }
    }
}
