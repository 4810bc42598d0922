//! Families that CUDA runs are as exact as transformers' own bf16; those that it does not run yet are refused by name.

use millrace_executor::engine::{Engine, load_on};
use millrace_executor::generate::GenerateOptions;
use millrace_executor::{DeviceKind, Dtype, ExecutorError, LoadOptions};
use millrace_kernels::{CudaBackend, KernelError};

use crate::fixture::{Family, options};
use crate::share;

/// The first device; `None`, with the reason printed, where there is none.
fn device(graphs: bool) -> Option<CudaBackend> {
    CudaBackend::new(0, graphs).map_err(|error| println!("skipped: {error}")).ok()
}

fn on_cuda() -> LoadOptions {
    LoadOptions { device: DeviceKind::Cuda(0), ..options(Dtype::Bf16) }
}

fn check(name: &str) {
    for graphs in [false, true] {
        let Some(backend) = device(graphs) else { return };
        let mut family = Family::open(name);
        let mut engine: Engine<CudaBackend> = load_on(&family.dir, backend, &on_cuda()).unwrap();
        for decode_answers in [false, true] {
            for together in [false, true] {
                let label = format!("{name} graphs {graphs} decode {decode_answers} together {together}");
                let options = GenerateOptions { decode_answers, ..GenerateOptions::default() };
                share::check(&label, &mut family, &mut engine, &options, together);
            }
        }
    }
}

#[test]
fn qwen3_on_cuda_is_as_exact_as_transformers() {
    check("qwen3");
}

#[test]
fn qwen3_vl_on_cuda_is_as_exact_as_transformers() {
    check("qwen3_vl");
}

#[test]
fn families_without_cuda_ops_are_refused_by_name() {
    for name in ["qwen3_moe", "qwen3_moe_one", "glm4_moe_lite", "glm4_moe_lite_one"] {
        let Some(backend) = device(true) else { return };
        let error = load_on(&Family::open(name).dir, backend, &on_cuda()).err().unwrap();
        let typed = matches!(&error, ExecutorError::Kernel(KernelError::Unsupported { .. }));
        assert!(typed && error.to_string().contains("mixtures of experts"), "{name}: {error}");
        println!("{name}: {error}");
    }
}
