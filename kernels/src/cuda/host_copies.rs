//! Copies between the device and page-locked host memory that nobody waits for: KV blocks and vision features. They run in
//! the stream's order, so what leaves is what the steps before left, and what comes back is there for the next step.

use cudarc::driver::sys;

use super::CudaBackend;
use super::driver::failed;
use super::pinned::Pinned;
use super::tensor::{CudaKvCache, CudaTensor, ELEMENT};
use crate::error::KernelError;
use crate::host_memory::HostMemory;
use crate::view::shape_error;

/// Where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Out,
    Back,
}

impl CudaKvCache {
    /// Bytes of a block's keys, and of its values.
    pub(super) fn half_block_bytes(&self) -> usize {
        self.block_tokens * self.kv_heads * self.head_dim * ELEMENT
    }
}

impl CudaBackend {
    /// Page-locked memory of `bytes`.
    pub(super) fn take_host_memory(&self, bytes: usize) -> Result<HostMemory, KernelError> {
        let mut memory = Pinned::new(&self.driver, bytes)?;
        memory.open()?.fill(0);
        Ok(HostMemory::pinned(memory))
    }

    /// Copies one block of all layers, for each layer keys, then values.
    pub(super) fn copy_block(
        &self,
        caches: &[CudaKvCache],
        block: u32,
        host: &mut HostMemory,
        offset: usize,
        way: Way,
    ) -> Result<(), KernelError> {
        let mut pieces = Vec::with_capacity(2 * caches.len());
        for cache in caches {
            if block as usize >= cache.blocks {
                let (index, limit) = (u64::from(block), cache.blocks as u64);
                return Err(KernelError::Index { op: "copy_kv_block", index, limit });
            }
            let bytes = cache.half_block_bytes();
            let start = u64::from(block) * bytes as u64;
            pieces.push((cache.keys.pointer + start, bytes));
            pieces.push((cache.values.pointer + start, bytes));
        }
        self.copy_pieces(&pieces, host, offset, way)
    }

    /// Copies a tensor's elements as they are.
    pub(super) fn copy_tensor(
        &self,
        x: &CudaTensor,
        host: &mut HostMemory,
        offset: usize,
        way: Way,
    ) -> Result<(), KernelError> {
        self.copy_pieces(&[(x.address(), x.elements() * ELEMENT)], host, offset, way)
    }

    /// Starts copies of pieces of device memory to or from host memory, where they lie one behind the other.
    fn copy_pieces(
        &self,
        pieces: &[(u64, usize)],
        host: &mut HostMemory,
        offset: usize,
        way: Way,
    ) -> Result<(), KernelError> {
        let pieces: Vec<(u64, usize)> = pieces.iter().copied().filter(|(_, bytes)| *bytes > 0).collect();
        if pieces.is_empty() {
            return Ok(());
        }
        host.check(offset, pieces.iter().map(|(_, bytes)| bytes).sum())?;
        let plain = || shape_error("host_copy", "memory that is not page-locked");
        let memory = host.as_pinned().ok_or_else(plain)?;
        let stream = self.driver.stream()?;
        let mut at = memory.address() + offset as u64;
        let mut device: Vec<u64> = pieces.iter().map(|(pointer, _)| *pointer).collect();
        let mut sizes: Vec<usize> = pieces.iter().map(|(_, bytes)| *bytes).collect();
        let mut here: Vec<u64> = Vec::with_capacity(pieces.len());
        for size in &sizes {
            here.push(at);
            at += *size as u64;
        }
        let (to, from) = match way {
            Way::Out => (&mut here, &mut device),
            Way::Back => (&mut device, &mut here),
        };
        if pieces.len() == 1 || !batch(to, from, &mut sizes, stream) {
            for ((to, from), size) in to.iter().zip(from.iter()).zip(&sizes) {
                // SAFETY: both ends hold `size` bytes, checked above, and outlive the stream's work: device memory is freed by a
                // call that waits, host memory waits for the event recorded below.
                unsafe { sys::cuMemcpyAsync(*to, *from, *size, stream) }.result().map_err(failed("cuMemcpyAsync"))?;
            }
        }
        memory.used(stream)
    }

    /// A tensor in the memory of what outlives a step, contents undefined.
    pub(super) fn feature(&self, shape: &[usize]) -> Result<CudaTensor, KernelError> {
        let bytes = shape.iter().product::<usize>() * ELEMENT;
        Ok(CudaTensor::piece(self.memory.feature(bytes)?, shape))
    }

    /// The same elements in the memory of what outlives a step.
    pub(super) fn kept(&self, x: &CudaTensor) -> Result<CudaTensor, KernelError> {
        let out = self.feature(x.shape())?;
        self.copy(x.address(), out.address(), x.elements() * ELEMENT)?;
        Ok(out)
    }
}

/// All copies by one call of the driver; false if it does not take them: none has begun then.
fn batch(to: &mut [u64], from: &mut [u64], sizes: &mut [usize], stream: sys::CUstream) -> bool {
    let nowhere = sys::CUmemLocation_st { type_: sys::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let mut attributes = sys::CUmemcpyAttributes_st {
        srcAccessOrder: sys::CUmemcpySrcAccessOrder_enum::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: nowhere,
        dstLocHint: nowhere,
        flags: 0,
    };
    let mut first = 0;
    let count = sizes.len();
    // SAFETY: three lists of `count` entries, one set of attributes for all from the first on; the copies themselves are as in
    // `copy_pieces`. The driver reads the lists before it returns.
    let status = unsafe {
        sys::cuMemcpyBatchAsync_v2(
            to.as_mut_ptr(),
            from.as_mut_ptr(),
            sizes.as_mut_ptr(),
            count,
            &raw mut attributes,
            &raw mut first,
            1,
            stream,
        )
    };
    status.result().is_ok()
}
