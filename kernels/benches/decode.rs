//! Speed of all linear layers of one decode step of Qwen3-0.6B's shape against plain reading of the same bytes, in turns.
//!
//! Decoding one sequence reads every weight once for each token, so plain reading by as many threads is the ceiling. On a
//! shared machine both vary together: the ratio of medians is the figure.
#![allow(clippy::expect_used, clippy::print_stdout, clippy::disallowed_methods)] // A program for people, not a service.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Storage, Tensor};
use half::bf16;
use millrace_kernels::{Backend, CpuBackend};

/// Rows and columns of a layer's weights: qkv, output, gate and up, down.
const LAYER: [(usize, usize); 4] = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)];
const LAYERS: usize = 28;
const HEAD: (usize, usize) = (151_936, 1024);
const ROUNDS: usize = 15;
/// Elements that a thread reads at a time.
const PIECE: usize = 192 * 1024;

fn main() {
    let backend = CpuBackend::new(DType::BF16).expect("backend");
    let shapes: Vec<_> = std::iter::repeat_n(LAYER, LAYERS).flatten().chain([HEAD]).collect();
    let constant = |rows: usize, columns: usize| {
        Tensor::from_vec(vec![bf16::from_f32(0.02); rows * columns], (rows, columns), &Device::Cpu).expect("tensor")
    };
    let weights: Vec<_> = shapes.iter().map(|&(rows, columns)| constant(rows, columns)).collect();
    let bytes: usize = shapes.iter().map(|(rows, columns)| rows * columns * 2).sum();
    for rows in [1, 2, 4, 8, 16, 32] {
        let inputs = [1024, 2048, 3072].map(|depth| constant(rows, depth));
        let (mut plain, mut linear) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            plain.push(seconds(|| read(&weights)));
            linear.push(seconds(|| {
                for (weight, (_, depth)) in weights.iter().zip(&shapes) {
                    backend.linear(&inputs[depth / 1024 - 1], weight, None).expect("linear");
                }
            }));
        }
        let [plain, linear] = [plain, linear].map(|mut times| {
            times.sort_by(f64::total_cmp);
            bytes as f64 / times[ROUNDS / 2] * 1e-9
        });
        println!("M = {rows:2}: linear {linear:5.1} GB/s, plain reading {plain:5.1} GB/s, ratio {:.2}", linear / plain);
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Reads all weights with as many threads as the backend has, piece by piece.
fn read(weights: &[Tensor]) {
    let storages: Vec<_> = weights.iter().map(|weight| weight.storage_and_layout().0).collect();
    let pieces: Vec<&[bf16]> = storages
        .iter()
        .flat_map(|storage| match &**storage {
            Storage::Cpu(cpu) => cpu.as_slice::<bf16>().expect("bf16").chunks(PIECE),
            _ => [].chunks(PIECE),
        })
        .collect();
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut sums = [0u16; 64];
                    for chunk in piece.as_chunks::<64>().0 {
                        for (sum, value) in sums.iter_mut().zip(chunk) {
                            *sum ^= value.to_bits();
                        }
                    }
                    std::hint::black_box(sums);
                }
            });
        }
    });
}
