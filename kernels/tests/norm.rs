//! RMSNorm, residual add with RMSNorm, LayerNorm and add against f64.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use millrace_kernels::Backend;
use support::{Random, assert_as_good_as, assert_refused, backends, bits, round};

const SIZES: [(usize, usize); 9] =
    [(1, 1), (3, 2), (1, 15), (5, 16), (2, 17), (7, 128), (31, 1000), (40, 1024), (2, 4099)];

#[test]
fn rms_norm_agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (rows, width) in SIZES {
            let (x, w) = (random.values(dtype, rows * width), random.values(dtype, width));
            let (mut plain, mut exact) = (Vec::new(), Vec::new());
            for row in x.chunks_exact(width) {
                let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + f64::from(1e-5f32)).sqrt();
                exact.extend(row.iter().zip(&w).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)));
                plain.extend(row.iter().zip(&w).map(|(x, w)| round(dtype, w * round(dtype, x * scale as f32))));
            }
            let (xs, ws) = (backend.upload(&x, &[rows, width]).unwrap(), backend.upload(&w, &[width]).unwrap());
            let y = backend.rms_norm(&xs, &ws, 1e-5).unwrap();
            assert_eq!(backend.shape(&y), [rows, width]);
            assert_as_good_as(&format!("{label}, {rows} x {width}"), &backend.to_host(&y).unwrap(), &plain, &exact);
        }
    }
}

/// HF rounds twice; an implementation that rounds once differs in about a quarter of the elements.
#[test]
fn bf16_rms_norm_rounds_twice() {
    let mut random = Random::fresh();
    for (label, backend) in backends().into_iter().filter(|(_, b)| b.dtype() == candle_core::DType::BF16) {
        let dtype = backend.dtype();
        let (x, w) = (random.values(dtype, 50 * 256), random.values(dtype, 256));
        let y = backend
            .rms_norm(&backend.upload(&x, &[50, 256]).unwrap(), &backend.upload(&w, &[256]).unwrap(), 1e-6)
            .unwrap();
        let (mut twice, mut once) = (0, 0);
        for (row, y) in x.chunks_exact(256).zip(backend.to_host(&y).unwrap().chunks_exact(256)) {
            let mean = row.iter().map(|v| v * v).sum::<f32>() / 256.0;
            let scale = 1.0 / (mean + 1e-6).sqrt();
            for ((x, w), y) in row.iter().zip(&w).zip(y) {
                twice += usize::from(round(dtype, w * round(dtype, x * scale)) != *y);
                once += usize::from(round(dtype, w * (x * scale)) != *y);
            }
        }
        assert!(twice < 13, "{label}: {twice} of 12800 differ from two roundings");
        assert!(once > 1000, "{label}: only {once} of 12800 differ from one rounding");
    }
}

#[test]
fn add_rms_norm_is_add_then_rms_norm() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (rows, width) in SIZES {
            let (a, b, w) =
                (random.values(dtype, rows * width), random.values(dtype, rows * width), random.values(dtype, width));
            let tensor = |values: &[f32]| backend.upload(values, &[rows, width]).unwrap();
            let w = backend.upload(&w, &[width]).unwrap();
            let (sum, normed) = backend.add_rms_norm(&tensor(&a), &tensor(&b), &w, 1e-6).unwrap();
            let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| round(dtype, a + b)).collect();
            assert_eq!(backend.to_host(&sum).unwrap(), expected, "{label}");
            assert_eq!(backend.to_host(&backend.add(&tensor(&a), &tensor(&b)).unwrap()).unwrap(), expected, "{label}");
            assert_eq!(bits(&backend, &normed), bits(&backend, &backend.rms_norm(&sum, &w, 1e-6).unwrap()), "{label}");
        }
    }
}

#[test]
fn layer_norm_agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (rows, width) in SIZES {
            let shifted: Vec<f32> = random.values(dtype, rows * width).iter().map(|v| round(dtype, v + 3.0)).collect();
            let (w, b) = (random.values(dtype, width), random.values(dtype, width));
            let (mut plain, mut exact) = (Vec::new(), Vec::new());
            for row in shifted.chunks_exact(width) {
                let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64;
                let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / width as f64;
                let scale = 1.0 / (variance + f64::from(1e-6f32)).sqrt();
                let affine = row.iter().zip(w.iter().zip(&b));
                exact.extend(affine.map(|(&x, (&w, &b))| (f64::from(x) - mean) * scale * f64::from(w) + f64::from(b)));
                let mean = row.iter().sum::<f32>() / width as f32;
                let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / width as f32;
                let scale = 1.0 / (variance + 1e-6).sqrt();
                let affine = row.iter().zip(w.iter().zip(&b));
                plain.extend(affine.map(|(x, (w, b))| round(dtype, (x - mean) * scale * w + b)));
            }
            let (ws, bs) = (backend.upload(&w, &[width]).unwrap(), backend.upload(&b, &[width]).unwrap());
            let y = backend.layer_norm(&backend.upload(&shifted, &[rows, width]).unwrap(), &ws, &bs, 1e-6).unwrap();
            assert_as_good_as(&format!("{label}, {rows} x {width}"), &backend.to_host(&y).unwrap(), &plain, &exact);
        }
    }
}

#[test]
fn add_layer_norm_is_add_then_layer_norm() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (rows, width) in SIZES {
            let [a, c] = [0, 1].map(|_| backend.upload(&random.values(dtype, rows * width), &[rows, width]).unwrap());
            let [w, b] = [0, 1].map(|_| backend.upload(&random.values(dtype, width), &[width]).unwrap());
            let (sum, normed) = backend.add_layer_norm(&a, &c, &w, &b, 1e-6).unwrap();
            assert_eq!(bits(&backend, &sum), bits(&backend, &backend.add(&a, &c).unwrap()), "{label}");
            let expected = backend.layer_norm(&sum, &w, &b, 1e-6).unwrap();
            assert_eq!(bits(&backend, &normed), bits(&backend, &expected), "{label}, {rows} x {width}");
        }
    }
}

#[test]
fn rows_do_not_see_each_other() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let (rows, width) = (61, 777);
        let mut x = random.values(backend.dtype(), rows * width);
        x[13 * width] = f32::NAN;
        let x = backend.upload(&x, &[rows, width]).unwrap();
        let w = backend.upload(&random.values(backend.dtype(), width), &[width]).unwrap();
        let rms = bits(&backend, &backend.rms_norm(&x, &w, 1e-6).unwrap());
        let layer = bits(&backend, &backend.layer_norm(&x, &w, &w, 1e-6).unwrap());
        for row in (0..rows).filter(|&row| row != 13) {
            let alone = backend.gather_rows(&x, &vec![row as u32]).unwrap();
            let range = row * width..(row + 1) * width;
            assert_eq!(bits(&backend, &backend.rms_norm(&alone, &w, 1e-6).unwrap()), rms[range.clone()], "{label}");
            assert_eq!(bits(&backend, &backend.layer_norm(&alone, &w, &w, 1e-6).unwrap()), layer[range], "{label}");
        }
    }
}

#[test]
fn empty_is_fine_and_bad_shapes_are_refused() {
    for (_, backend) in backends() {
        let tensor = |shape: &[usize]| backend.upload(&vec![1.0; shape.iter().product()], shape).unwrap();
        assert_eq!(backend.shape(&backend.rms_norm(&tensor(&[0, 4]), &tensor(&[4]), 1e-6).unwrap()), [0, 4]);
        assert_eq!(backend.shape(&backend.add(&tensor(&[0, 4]), &tensor(&[0, 4])).unwrap()), [0, 4]);
        assert_refused(backend.rms_norm(&tensor(&[2, 4]), &tensor(&[3]), 1e-6), "rms_norm");
        assert_refused(backend.rms_norm(&tensor(&[2, 0]), &tensor(&[0]), 1e-6), "rms_norm");
        assert_refused(backend.layer_norm(&tensor(&[2, 4]), &tensor(&[4]), &tensor(&[5]), 1e-6), "layer_norm");
        assert_refused(backend.add(&tensor(&[2, 4]), &tensor(&[4, 2])), "add");
        let layer =
            |x: &[usize], w| backend.add_layer_norm(&tensor(&[2, 4]), &tensor(x), &tensor(&[w]), &tensor(&[w]), 1e-6);
        assert_refused(layer(&[2, 4], 5), "layer_norm");
        assert_refused(layer(&[4, 2], 4), "add");
        assert_refused(backend.add_rms_norm(&tensor(&[2, 4]), &tensor(&[2, 4]), &tensor(&[2]), 1e-6), "rms_norm");
    }
}
