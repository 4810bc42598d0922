//! The CUDA device of a test, and runs of one op on three backends.
#![allow(dead_code)] // Each test file uses its own part.

use candle_core::DType;
use millrace_kernels::{Backend, CpuBackend, CudaBackend, Ragged, Staged, StepInputs};

use super::support::assert_as_good_as;

/// The first CUDA device; `None`, with the reason printed, where there is none.
pub fn device(graphs: bool) -> Option<CudaBackend> {
    match CudaBackend::new(0, graphs) {
        Ok(backend) => {
            println!("on {}", backend.description());
            Some(backend)
        }
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// An op on any backend: inputs in, values out.
pub trait Op {
    fn run<B: Backend>(&self, backend: &B) -> Vec<f32>;
}

/// Fills free memory with NaN, so that what an op does not write is seen.
pub fn poison(backend: &CudaBackend, elements: usize) {
    drop(backend.upload(&vec![f32::NAN; elements], &[elements]).unwrap());
}

/// The op's error on CUDA against f32 on the CPU is at most twice that of the CPU twin in bf16.
#[track_caller]
pub fn compare(label: &str, cuda: &CudaBackend, op: &impl Op) {
    let exact = op.run(&CpuBackend::new(DType::F32).unwrap());
    let exact: Vec<f64> = exact.into_iter().map(f64::from).collect();
    let plain = op.run(&CpuBackend::new(DType::BF16).unwrap());
    poison(cuda, 16 << 20);
    let ours = op.run(cuda);
    assert_as_good_as(label, &ours, &plain, &exact);
}

/// Runs `body` on `ragged` staged by `backend` and returns its values; `width` columns of ones stand for logits.
pub fn staged<B: Backend>(
    backend: &B,
    ragged: &Ragged,
    positions: Vec<[u32; 3]>,
    block_tokens: usize,
    mut body: impl FnMut(&Staged<B>) -> Vec<f32>,
) -> Vec<f32> {
    let ids = vec![0; positions.len()];
    let (ragged, logit_rows) = (ragged.clone(), vec![0]);
    let inputs = StepInputs { ids, positions, ragged, block_tokens, logit_rows, replayable: false };
    let mut values = Vec::new();
    let forward = &mut |staged: &Staged<B>| {
        values = body(staged);
        backend.upload(&[1.0; 8], &[1, 8])
    };
    backend.step::<millrace_kernels::KernelError>(inputs, forward).unwrap();
    values
}
