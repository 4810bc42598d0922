//! The device operations of Millrace, each implemented twice: a CPU twin on candle-core tensors (the reference in tests
//! and the backend without a GPU) and, under feature `cuda`, our own device code.
//!
//! Owns the only `unsafe` in the tree. Must not know a model: model files are written against [`Backend`].

pub mod backend;
pub mod cpu;
pub mod error;

mod activation;
mod angles;
mod attend;
mod batch;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device_memory;
mod element;
mod grid;
mod host;
mod host_memory;
mod kv_cache;
mod linear;
pub mod mapped;
mod matmul;
mod mla;
mod mla_attention;
mod moe;
mod norm;
mod paged_attention;
mod patches;
#[cfg(any(feature = "cuda", test))]
mod requirements;
mod rope;
mod router;
mod rows;
mod segment_attention;
mod simd;
pub mod slabs;
mod step;
mod threads;
mod view;

pub use angles::{CpuFrequencies, angle};
pub use backend::{Backend, GeluKind, RopeTable, Segments, SigmoidChoice};
pub use cpu::{CpuBackend, CpuGeometry};
#[cfg(feature = "cuda")]
pub use cuda::{CudaBackend, CudaLogits};
pub use device_memory::{ByteSize, DeviceMemory, MemoryKind, MemoryReader};
pub use error::KernelError;
pub use grid::PatchGrids;
pub use host_memory::HostMemory;
pub use kv_cache::CpuKvCache;
pub use mapped::{MappedFile, mapped_tensor};
pub use patches::PatchPage;
pub use router::CpuRouting;
pub use simd::Isa;
pub use slabs::{Place, SlabBook};
pub use step::{Draw, Finished, Forward, Ragged, Staged, StepInputs, StepTimes};
