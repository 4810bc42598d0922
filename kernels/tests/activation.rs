//! SwiGLU and both GELUs against f64.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use millrace_kernels::{Backend, GeluKind};
use support::{Random, assert_as_good_as, assert_refused, backends, round};

#[test]
fn swiglu_agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for (rows, half) in [(0, 3), (2, 0), (1, 1), (3, 17), (5, 64), (33, 1000)] {
            let x: Vec<f32> = random.values(dtype, rows * 2 * half).iter().map(|v| v * 4.0).collect();
            let (mut plain, mut exact) = (Vec::new(), Vec::new());
            for row in x.chunks_exact((2 * half).max(1)) {
                for (&gate, &up) in row[..half].iter().zip(&row[half..]) {
                    let silu = f64::from(gate) / (1.0 + (-f64::from(gate)).exp());
                    exact.push(silu * f64::from(up));
                    plain.push(round(dtype, round(dtype, silu as f32) * up));
                }
            }
            let y = backend.swiglu(&backend.upload(&x, &[rows, 2 * half]).unwrap()).unwrap();
            assert_eq!(backend.shape(&y), [rows, half]);
            let y = backend.to_host(&y).unwrap();
            assert_as_good_as(&format!("{label}, {rows} x {half}"), &y, &plain, &exact);
            let differ = y.iter().zip(&plain).filter(|(a, b)| (**a - **b).abs() > 1e-5 * b.abs()).count();
            assert!(differ * 200 <= y.len(), "{label}: {differ} of {} differ from the documented roundings", y.len());
        }
    }
}

#[test]
fn gelu_agrees_with_f64() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        let dtype = backend.dtype();
        for kind in [GeluKind::Tanh, GeluKind::Erf] {
            for count in [0, 1, 17, 5_000] {
                let x: Vec<f32> = random.values(dtype, count).iter().map(|v| v * 2.0).collect();
                let exact: Vec<f64> = x
                    .iter()
                    .map(|&x| f64::from(x))
                    .map(|x| match kind {
                        GeluKind::Tanh => {
                            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
                        }
                        GeluKind::Erf => 0.5 * x * (1.0 + candle_core::cpu::erf::erf_f64(x / 2f64.sqrt())),
                    })
                    .collect();
                let plain: Vec<f32> = exact.iter().map(|&v| round(dtype, v as f32)).collect();
                let y = backend.gelu(&backend.upload(&x, &[count]).unwrap(), kind).unwrap();
                assert_as_good_as(
                    &format!("{label}, {kind:?} of {count}"),
                    &backend.to_host(&y).unwrap(),
                    &plain,
                    &exact,
                );
            }
        }
    }
}

#[test]
fn extremes_saturate() {
    for (label, backend) in backends() {
        let x = backend.upload(&[200.0, -200.0, 1e30, -1e30, 0.0], &[5]).unwrap();
        for kind in [GeluKind::Tanh, GeluKind::Erf] {
            let y = backend.to_host(&backend.gelu(&x, kind).unwrap()).unwrap();
            assert_eq!(y[0], 200.0, "{label} {kind:?}");
            assert!(y[2] > 9e29 && y.iter().all(|v| v.is_finite()), "{label} {kind:?}: {y:?}");
            assert!(y[1].abs() < 1e-30 && y[3].abs() < 1e-30 && y[4] == 0.0, "{label} {kind:?}: {y:?}");
        }
        let gate = backend.upload(&[-300.0, 300.0, 2.0, 2.0], &[1, 4]).unwrap();
        let y = backend.to_host(&backend.swiglu(&gate).unwrap()).unwrap();
        assert!(y[0] == 0.0 && y[1] == backend.to_host(&gate).unwrap()[1] * 2.0, "{label}: {y:?}");
    }
}

#[test]
fn bad_shapes_are_refused() {
    for (_, backend) in backends() {
        assert_refused(backend.swiglu(&backend.upload(&[0.0; 6], &[2, 3]).unwrap()), "swiglu");
        assert_refused(backend.swiglu(&backend.upload(&[0.0; 6], &[6]).unwrap()), "swiglu");
    }
}
