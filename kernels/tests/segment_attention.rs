//! `segment_attention` against f64; segments do not see each other.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use candle_core::{DType, Tensor};
use millrace_kernels::{Backend, CpuBackend, KernelError, PatchGrids, Segments, angle};
use support::{Random, assert_as_good_as, assert_refused, backends, bits, round};

/// Grids with `sizes[i]` patches each and frequencies of heads of `d`; their cos and sin `[patches, d / 2]`.
fn angles(random: &mut Random, sizes: &[u32], d: usize) -> (Places, [Vec<f32>; 2]) {
    let sizes: Vec<[u32; 2]> = sizes.iter().map(|&patches| sides(patches)).collect();
    let inverse: Vec<f32> = (0..d / 4).map(|_| random.uniform()).collect();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for [h, w] in &sizes {
        for (row, column) in (0..*h).flat_map(|row| (0..*w).map(move |column| (row, column))) {
            for position in [row, column] {
                for frequency in &inverse {
                    let (c, s) = angle(position, *frequency);
                    cos.push(c);
                    sin.push(s);
                }
            }
        }
    }
    ((PatchGrids { sizes, merge: 1 }, inverse), [cos, sin])
}

type Places = (PatchGrids, Vec<f32>);

/// The most square grid of so many patches.
fn sides(patches: u32) -> [u32; 2] {
    let rows = (1..=patches.isqrt()).rev().find(|rows| patches.is_multiple_of(*rows)).unwrap_or(0);
    [rows, patches.checked_div(rows).unwrap_or(0)]
}

/// One segment in (f64, plain arithmetic).
fn reference(
    dtype: DType,
    qkv: &[f32],
    heads: usize,
    d: usize,
    cos: &[f32],
    sin: &[f32],
    scale: f32,
) -> (Vec<f64>, Vec<f32>) {
    let (rows, half) = (qkv.len() / (3 * heads * d), d / 2);
    let part = |row: usize, which: usize, head: usize| &qkv[(row * 3 + which) * heads * d + head * d..][..d];
    let rotated = |row: usize, which: usize, head: usize| -> Vec<f32> {
        let x = part(row, which, head);
        (0..d)
            .map(|i| {
                let (c, s) = (cos[row * half + i % half], sin[row * half + i % half]);
                round(dtype, x[i] * c + if i < half { -x[i + half] } else { x[i - half] } * s)
            })
            .collect()
    };
    let (mut exact, mut plain) = (vec![0.0; rows * heads * d], vec![0.0; rows * heads * d]);
    for head in 0..heads {
        let keys: Vec<_> = (0..rows).map(|row| rotated(row, 1, head)).collect();
        for row in 0..rows {
            let q = rotated(row, 0, head);
            let scores = keys
                .iter()
                .map(|k| k.iter().zip(&q).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() * f64::from(scale));
            let scores: Vec<f64> = scores.collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = p.iter().sum();
            for i in 0..d {
                let at = (row * heads + head) * d + i;
                exact[at] = p.iter().enumerate().map(|(t, p)| p * f64::from(part(t, 2, head)[i])).sum::<f64>() / total;
                let sum: f32 = p.iter().enumerate().map(|(t, &p)| round(dtype, p as f32) * part(t, 2, head)[i]).sum();
                plain[at] = round(dtype, sum / total as f32);
            }
        }
    }
    (exact, plain)
}

fn attend(
    backend: &CpuBackend,
    qkv: &Tensor,
    heads: usize,
    (grids, inverse): &Places,
    start: &[u32],
    scale: f32,
) -> Result<Tensor, KernelError> {
    let geometry = backend.geometry(grids, inverse, Segments { start: start.to_vec() })?;
    backend.segment_attention(qkv, heads, &geometry, scale)
}

#[test]
fn agrees_with_f64_and_segments_are_apart() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (heads, d) in [(2, 64), (1, 4), (3, 20), (1, 80)] {
            let start = [0, 1, 1, 18, 50, 87];
            let sizes: Vec<u32> = start.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let rows = 87;
            let qkv = random.values(dtype, rows * 3 * heads * d);
            let (places, [cos, sin]) = angles(&mut random, &sizes, d);
            let scale = (d as f32).powf(-0.5);
            let x = backend.upload(&qkv, &[rows, 3 * heads * d]).unwrap();
            let out = attend(&backend, &x, heads, &places, &start, scale).unwrap();
            assert_eq!(backend.shape(&out), [rows, heads * d]);
            let (mut exact, mut plain, mut alone) = (Vec::new(), Vec::new(), Vec::new());
            for (pair, size) in start.windows(2).zip(&places.0.sizes) {
                let (from, to) = (pair[0] as usize, pair[1] as usize);
                let qkv = &qkv[from * 3 * heads * d..to * 3 * heads * d];
                let (cos, sin) = (&cos[from * d / 2..to * d / 2], &sin[from * d / 2..to * d / 2]);
                let (e, p) = reference(dtype, qkv, heads, d, cos, sin, scale);
                exact.extend(e);
                plain.extend(p);
                let x = backend.upload(qkv, &[to - from, 3 * heads * d]).unwrap();
                let own = (PatchGrids { sizes: vec![*size], merge: 1 }, places.1.clone());
                let start = [0, (to - from) as u32];
                alone.extend(bits(&backend, &attend(&backend, &x, heads, &own, &start, scale).unwrap()));
            }
            let label = format!("{label}, {heads} heads of {d}");
            assert_as_good_as(&label, &backend.to_host(&out).unwrap(), &plain, &exact);
            assert!(bits(&backend, &out) == alone, "{label}: a segment alone differs");
        }
    }
}

#[test]
fn a_segment_longer_than_a_page_agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let (rows, d) = (700, 16);
        let qkv = random.values(backend.dtype(), rows * 3 * d);
        let (places, [cos, sin]) = angles(&mut random, &[rows as u32], d);
        let x = backend.upload(&qkv, &[rows, 3 * d]).unwrap();
        let out = attend(&backend, &x, 1, &places, &[0, rows as u32], 0.25).unwrap();
        let (exact, plain) = reference(backend.dtype(), &qkv, 1, d, &cos, &sin, 0.25);
        assert_as_good_as(&label, &backend.to_host(&out).unwrap(), &plain, &exact);
    }
}

#[test]
fn bad_shapes_are_refused() {
    for (_, backend) in backends() {
        let x = backend.upload(&[0.0; 24], &[2, 12]).unwrap();
        let run = |heads, patches: u32, frequencies: usize| {
            let places = (PatchGrids { sizes: vec![[1, patches]], merge: 1 }, vec![0.0; frequencies]);
            attend(&backend, &x, heads, &places, &[0, patches], 1.0)
        };
        assert!(run(1, 2, 1).is_ok());
        let op = "segment_attention";
        assert_refused(run(0, 2, 1), op);
        assert_refused(run(4, 2, 1), op);
        assert_refused(run(1, 2, 2), op);
        assert_refused(run(1, 1, 1), op);
        assert_refused(run(1, 3, 1), op);
    }
}
