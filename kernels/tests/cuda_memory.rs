//! Memory of the CUDA backend: copies of KV blocks and tensors to page-locked memory and back, bytes by kind, and what is said
//! when there is no more. Skips, and says so, without a device.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

#[path = "support/device.rs"]
mod device;
mod support;

use candle_core::DType;
use device::{device, poison};
use millrace_kernels::{Backend, KernelError, MemoryKind};
use support::Random;

const LAYERS: usize = 3;
const BLOCKS: usize = 11;

#[test]
fn kv_blocks_come_back_with_equal_bits() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    for (block_tokens, kv_heads, dim) in [(16, 8, 128), (5, 1, 64), (1, 3, 2)] {
        let mut pools: Vec<_> =
            (0..LAYERS).map(|_| cuda.kv_cache(BLOCKS, block_tokens, kv_heads, dim).unwrap()).collect();
        let bytes = cuda.kv_block_bytes(&pools);
        assert_eq!(bytes, LAYERS * 2 * block_tokens * kv_heads * dim * 2);
        let mut host = cuda.host_memory(4 * bytes).unwrap();
        let contents: Vec<u8> = (0..bytes).map(|_| random.below(256) as u8).collect();
        host.part(bytes, bytes).unwrap().copy_from_slice(&contents);
        // In, out to another page, in elsewhere, over the first, all without waiting.
        cuda.write_kv_block(&mut pools, 7, &mut host, bytes).unwrap();
        cuda.read_kv_block(&pools, 7, &mut host, 3 * bytes).unwrap();
        cuda.read_kv_block(&pools, 6, &mut host, bytes).unwrap();
        cuda.write_kv_block(&mut pools, 7, &mut host, bytes).unwrap();
        cuda.write_kv_block(&mut pools, 10, &mut host, 3 * bytes).unwrap();
        cuda.read_kv_block(&pools, 10, &mut host, 0).unwrap();
        cuda.read_kv_block(&pools, 7, &mut host, 2 * bytes).unwrap();
        assert!(host.part(0, bytes).unwrap() == contents, "what came back elsewhere");
        assert!(host.part(3 * bytes, bytes).unwrap() == contents, "what left");
        assert!(host.part(bytes, 2 * bytes).unwrap().iter().all(|byte| *byte == 0), "neighbours stay as they were");
        assert!(matches!(cuda.read_kv_block(&pools, 11, &mut host, 0), Err(KernelError::Index { .. })));
        assert!(matches!(cuda.read_kv_block(&pools, 0, &mut host, 3 * bytes + 1), Err(KernelError::Shape { .. })));
    }
}

#[test]
fn tensors_leave_and_come_back() {
    let Some(cuda) = device(false) else { return };
    let mut random = Random::fresh();
    let shape = [37, 65];
    let values = random.values(DType::BF16, 37 * 65);
    let x = cuda.upload(&values, &shape).unwrap();
    let kept = cuda.keep(&x).unwrap();
    drop(x);
    poison(&cuda, 1 << 20);
    assert_eq!(cuda.to_host(&kept).unwrap(), values);
    let bytes = cuda.tensor_bytes(&kept);
    let mut host = cuda.host_memory(3 * bytes).unwrap();
    cuda.read_tensor(&kept, &mut host, bytes).unwrap();
    drop(kept);
    let back = cuda.write_tensor(&shape, &mut host, bytes).unwrap();
    assert_eq!((cuda.to_host(&back).unwrap(), cuda.shape(&back)), (values, shape.to_vec()));
    let held = cuda.device_memory().unwrap();
    assert_eq!(held.of(MemoryKind::Features), 64 << 20, "both in one slab of their own");
    assert!(cuda.write_tensor(&[usize::MAX / 4], &mut host, 0).is_err());
}

#[test]
fn bytes_are_counted_by_kind_and_the_end_is_told() {
    let Some(cuda) = device(false) else { return };
    let before = cuda.device_memory().unwrap();
    assert!(before.of(MemoryKind::Scratch) > 32 << 20 && before.of(MemoryKind::KvPool) == 0);
    let pool = cuda.kv_cache(8, 16, 8, 128).unwrap();
    let with = cuda.device_memory().unwrap();
    assert_eq!(with.of(MemoryKind::KvPool), 2 * 8 * 16 * 8 * 128 * 2);
    assert_eq!(with.allocations, before.allocations + 2);
    drop(pool);
    assert_eq!(cuda.device_memory().unwrap().of(MemoryKind::KvPool), 0);
    let blocks = before.total_bytes as usize / (16 * 8 * 128 * 2);
    match cuda.kv_cache(blocks, 16, 8, 128).map(drop) {
        Err(error @ KernelError::OutOfMemory { kind: MemoryKind::KvPool, .. }) => {
            let text = error.to_string();
            println!("{text}");
            assert!(text.contains("more for the KV pool do not fit; held are weights 0 B + KV pool"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    // The device goes on.
    let x = cuda.upload(&[1.0, 2.0], &[1, 2]).unwrap();
    assert_eq!(cuda.to_host(&cuda.add(&x, &x).unwrap()).unwrap(), [2.0, 4.0]);
}
