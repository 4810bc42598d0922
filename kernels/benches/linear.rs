//! Speed of `linear` on the CPU: weight bytes per second where rows are few, operations per second where they are many.
//!
//! Weights rotate through a set larger than the last-level cache. Times on a shared machine vary: compare programs within
//! one minute only. `cargo bench --bench linear -- avx2` or `portable` takes another instruction set.
#![allow(clippy::expect_used, clippy::print_stdout, clippy::disallowed_methods)] // A program for people, not a service.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use millrace_kernels::{Backend, CpuBackend, Isa};

/// Bytes of the rotating set of weights.
const COLD_BYTES: usize = 192 << 20;

fn main() {
    let isa = match std::env::args().nth(1).as_deref() {
        Some("avx2") => Isa::Avx2,
        Some("portable") => Isa::Portable,
        _ => Isa::detect(),
    };
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    println!("{isa:?}, {threads} threads");
    println!("{:>6} {:>6} {:>6} {:>6} {:>10} {:>10}", "dtype", "M", "N", "K", "GB/s", "GFLOP/s");
    for dtype in [DType::BF16, DType::F32] {
        let backend = CpuBackend::with(dtype, threads, isa).expect("backend");
        for (columns, depth) in [(3072, 1024), (1024, 3072), (4096, 1024)] {
            let bytes = columns * depth * dtype.size_in_bytes();
            let weights: Vec<_> = (0..COLD_BYTES / bytes)
                .map(|_| Tensor::randn(0f32, 0.02, (columns, depth), &Device::Cpu).expect("weight"))
                .map(|weight| backend.weight(&weight).expect("weight"))
                .collect();
            for rows in [1, 2, 4, 8, 32, 128, 512] {
                let x = Tensor::randn(0f32, 1.0, (rows, depth), &Device::Cpu).expect("input");
                let x = backend.weight(&x).expect("input");
                let calls = (4096 / rows).clamp(8, 256);
                let mut best = f64::INFINITY;
                for _ in 0..3 {
                    let start = Instant::now();
                    for call in 0..calls {
                        backend.linear(&x, &weights[call % weights.len()], None).expect("linear");
                    }
                    best = best.min(start.elapsed().as_secs_f64() / calls as f64);
                }
                let operations = 2.0 * (rows * columns * depth) as f64;
                println!(
                    "{:>6} {rows:>6} {columns:>6} {depth:>6} {:>10.1} {:>10.1}",
                    format!("{dtype:?}"),
                    bytes as f64 / best * 1e-9,
                    operations / best * 1e-9
                );
            }
        }
    }
}
