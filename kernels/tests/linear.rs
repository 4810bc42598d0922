//! `linear` against f64, over odd sizes; rows computed together equal rows computed alone.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use millrace_kernels::{Backend, CpuBackend};
use support::{Random, assert_as_good_as, assert_refused, backends, bits, round};

/// Rows, columns, depth.
const SIZES: [(usize, usize, usize); 13] = [
    (1, 1, 1),
    (1, 7, 31),
    (2, 6, 32),
    (3, 13, 33),
    (4, 12, 64),
    (5, 17, 65),
    (7, 5, 127),
    (11, 29, 96),
    (9, 100, 257),
    (33, 61, 128),
    (1, 257, 1024),
    (70, 31, 3001),
    (130, 3, 48),
];

#[test]
fn agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (rows, columns, depth) in SIZES {
            let x = random.values(dtype, rows * depth);
            let w = random.values(dtype, columns * depth);
            let bias = random.values(dtype, columns);
            for with_bias in [false, true] {
                let (mut exact, mut plain) = (Vec::new(), Vec::new());
                for row in x.chunks_exact(depth) {
                    for (column, weight) in w.chunks_exact(depth).enumerate() {
                        let start = if with_bias { bias[column] } else { 0.0 };
                        let products = row.iter().zip(weight);
                        exact.push(
                            products.clone().map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
                                + f64::from(start),
                        );
                        plain.push(round(dtype, products.map(|(a, b)| a * b).sum::<f32>() + start));
                    }
                }
                let tensor = |values: &[f32], shape: &[usize]| backend.upload(values, shape).unwrap();
                let bias = with_bias.then(|| tensor(&bias, &[columns]));
                let y =
                    backend.linear(&tensor(&x, &[rows, depth]), &tensor(&w, &[columns, depth]), bias.as_ref()).unwrap();
                assert_eq!(backend.shape(&y), [rows, columns]);
                let label = format!("{label}, {rows} x {columns} x {depth}");
                assert_as_good_as(&label, &backend.to_host(&y).unwrap(), &plain, &exact);
            }
        }
    }
}

#[test]
fn batched_equals_single_and_any_cut() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        // Deep enough that many rows meet the depth in cuts and few rows do not.
        let (rows, columns, depth) = (67, 45, 2109);
        let x = backend.upload(&random.values(backend.dtype(), rows * depth), &[rows, depth]).unwrap();
        let w = backend.upload(&random.values(backend.dtype(), columns * depth), &[columns, depth]).unwrap();
        let whole = bits(&backend, &backend.linear(&x, &w, None).unwrap());
        for cut in [1, 2, 3, 5, 8, 64] {
            let mut pieces = Vec::new();
            for start in (0..rows).step_by(cut) {
                let piece: Vec<u32> = (start as u32..rows.min(start + cut) as u32).collect();
                let piece = backend.gather_rows(&x, &piece).unwrap();
                pieces.extend(bits(&backend, &backend.linear(&piece, &w, None).unwrap()));
            }
            assert!(pieces == whole, "{label}: rows in pieces of {cut} differ from all rows at once");
        }
        let columns_alone: Vec<u32> = (0..columns as u32)
            .map(|column| {
                let w = backend.gather_rows(&w, &vec![column]).unwrap();
                let x = backend.gather_rows(&x, &vec![13]).unwrap();
                bits(&backend, &backend.linear(&x, &w, None).unwrap())[0]
            })
            .collect();
        assert_eq!(columns_alone, whole[13 * columns..14 * columns], "{label}: a column alone differs");
    }
}

#[test]
fn thread_count_changes_nothing() {
    let mut random = Random::fresh();
    let x = random.values(candle_core::DType::F32, 61 * 1111);
    let w = random.values(candle_core::DType::F32, 333 * 1111);
    for dtype in [candle_core::DType::F32, candle_core::DType::BF16] {
        let run = |threads| {
            let backend = CpuBackend::with(dtype, threads, millrace_kernels::Isa::detect()).unwrap();
            let (x, w) = (backend.upload(&x, &[61, 1111]).unwrap(), backend.upload(&w, &[333, 1111]).unwrap());
            bits(&backend, &backend.linear(&x, &w, None).unwrap())
        };
        let one = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one));
    }
}

#[test]
fn empty_problems_are_fine() {
    for (_, backend) in backends() {
        let w = backend.upload(&[1.0; 12], &[3, 4]).unwrap();
        let y = backend.linear(&backend.upload(&[], &[0, 4]).unwrap(), &w, None).unwrap();
        assert_eq!(backend.shape(&y), [0, 3]);
        let none = backend.upload(&[], &[2, 0]).unwrap();
        let bias = backend.upload(&[1.0, 2.0], &[2]).unwrap();
        let y = backend.linear(&none, &none, Some(&bias)).unwrap();
        assert_eq!(backend.to_host(&y).unwrap(), [1.0, 2.0, 1.0, 2.0]);
    }
}

#[test]
fn bad_shapes_are_refused() {
    for (_, backend) in backends() {
        let tensor = |shape: &[usize]| backend.upload(&vec![0.0; shape.iter().product()], shape).unwrap();
        assert_refused(backend.linear(&tensor(&[2, 3]), &tensor(&[4, 5]), None), "linear");
        assert_refused(backend.linear(&tensor(&[6]), &tensor(&[4, 6]), None), "linear");
        assert_refused(backend.linear(&tensor(&[2, 3]), &tensor(&[4, 3]), Some(&tensor(&[3]))), "linear");
        let other =
            if backend.dtype() == candle_core::DType::F32 { candle_core::DType::BF16 } else { candle_core::DType::F32 };
        let other = tensor(&[2, 3]).to_dtype(other).unwrap();
        assert_refused(backend.linear(&other, &tensor(&[4, 3]), None), "linear");
    }
}
