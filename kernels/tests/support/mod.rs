//! Shared by the op tests: fresh random inputs, every variant of the CPU backend, and the error bound.
#![allow(dead_code)] // Each test file uses its own part.

use std::hash::{BuildHasher, Hasher, RandomState};

use candle_core::{DType, Tensor};
use half::bf16;
use millrace_kernels::{Backend, CpuBackend, Isa, KernelError};

/// xorshift64* numbers.
pub struct Random(u64);

impl Random {
    /// A new seed each run, printed so that a failure can be repeated with [`Random::from_seed`].
    pub fn fresh() -> Self {
        let seed = RandomState::new().build_hasher().finish() | 1;
        println!("seed {seed}");
        Self::from_seed(seed)
    }

    pub fn from_seed(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// About normal(0, 1): twelve uniforms.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// `count` normal values, already rounded to `dtype`.
    pub fn values(&mut self, dtype: DType, count: usize) -> Vec<f32> {
        (0..count).map(|_| round(dtype, self.normal())).collect()
    }

    /// 0..count in random order.
    pub fn shuffled(&mut self, count: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count as u32).collect();
        for i in (1..count).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// `value` after one rounding to `dtype`, by the `half` crate.
pub fn round(dtype: DType, value: f32) -> f32 {
    if dtype == DType::BF16 { bf16::from_f32(value).to_f32() } else { value }
}

/// Mean and deviation of three channels.
pub type Colours = ([f32; 3], [f32; 3]);

/// Samples of a page `[rows, 3, slots, area]` (all values come up where there is room), how they are normalised, and the
/// normalised values by the reference's formula.
pub fn samples(random: &mut Random, rows: usize, slots: usize, area: usize) -> (Vec<u8>, Colours, Vec<f32>) {
    let bytes: Vec<u8> = (0..rows * 3 * slots * area).map(|n| (n + random.below(3)) as u8).collect();
    let mean: [f32; 3] = [0.481_454_66, 0.5, random.uniform()];
    let std: [f32; 3] = [0.268_629_54, 0.5, 0.01 + random.uniform()];
    let value = |(n, x): (usize, &u8)| {
        let channel = n / (slots * area) % 3;
        (f32::from(*x) - mean[channel] * 255.0) / (std[channel] * 255.0)
    };
    let values = bytes.iter().enumerate().map(value).collect();
    (bytes, (mean, std), values)
}

/// Both element types on every instruction set of this processor, with one and with three threads.
pub fn backends() -> Vec<(String, CpuBackend)> {
    let mut backends = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable] {
            for threads in [1, 3] {
                if isa.available() {
                    let backend = CpuBackend::with(dtype, threads, isa).unwrap();
                    backends.push((format!("{dtype:?} {isa:?} {threads} threads"), backend));
                }
            }
        }
    }
    backends
}

/// The elements' bits, so that NaN and signs count.
pub fn bits(backend: &CpuBackend, x: &Tensor) -> Vec<u32> {
    backend.to_host(x).unwrap().into_iter().map(f32::to_bits).collect()
}

/// Root mean square and largest absolute difference.
fn errors(values: &[f32], exact: &[f64]) -> (f64, f64) {
    let differences = values.iter().zip(exact).map(|(&v, &e)| (f64::from(v) - e).abs());
    let square: f64 = differences.clone().map(|d| d * d).sum();
    (
        (square / exact.len().max(1) as f64).sqrt(),
        differences.fold(0.0, |a, b| if b.is_nan() { f64::INFINITY } else { a.max(b) }),
    )
}

/// The error of `ours` against `exact` is at most twice that of `plain`, a direct implementation in the same precision: in the mean
/// (root mean square) and at its largest. For inputs of size about one.
#[track_caller]
pub fn assert_as_good_as(label: &str, ours: &[f32], plain: &[f32], exact: &[f64]) {
    assert_eq!(ours.len(), exact.len(), "{label}: length");
    assert_eq!(plain.len(), exact.len(), "{label}: length");
    let ((rms, max), (plain_rms, plain_max)) = (errors(ours, exact), errors(plain, exact));
    let size = exact.iter().fold(0f64, |a, b| a.max(b.abs()));
    let floor = size.max(1.0) * 1e-6;
    assert!(
        rms <= 2.0 * plain_rms + floor && max <= 2.0 * plain_max + floor,
        "{label}: error {rms:.3e} (max {max:.3e}), plain implementation {plain_rms:.3e} (max {plain_max:.3e})"
    );
}

/// The result is an error that names `op`.
#[track_caller]
pub fn assert_refused<T>(result: Result<T, KernelError>, op: &str) {
    match result {
        Ok(_) => panic!("{op} accepted bad arguments"),
        Err(error) => assert!(error.to_string().starts_with(op), "{error} does not name {op}"),
    }
}
