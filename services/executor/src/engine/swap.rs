//! Host memory for KV blocks that left the pool: numbered pages of one allocation, which a device that copies by itself has
//! page-locked. All layers of a block are one page, copied bit by bit, in the order of the device's work: nobody waits.
//! Whether copying pays is the scheduler's decision.

use millrace_kernels::{Backend, HostMemory};
use millrace_protocol::plan::BlockCopy;

use super::{Broken, broken};

/// Pages of host memory.
#[derive(Debug, Default)]
pub(super) struct HostPages {
    memory: Option<HostMemory>,
    /// Whether each page was written.
    written: Vec<bool>,
    page_bytes: usize,
}

impl HostPages {
    /// As many pages as `bytes` holds. None if the backend cannot copy blocks, or if there is no such memory: blocks that leave
    /// the pool are computed again then.
    pub fn new<B: Backend>(backend: &B, caches: &[B::KvCache], bytes: u64) -> Self {
        let page_bytes = backend.kv_block_bytes(caches);
        let count = bytes.checked_div(page_bytes as u64).unwrap_or(0).min(u64::from(u32::MAX));
        let count = usize::try_from(count).unwrap_or(0);
        if count == 0 {
            return Self::default();
        }
        let memory = match backend.host_memory(count * page_bytes) {
            Ok(memory) => Some(memory),
            Err(error) => {
                tracing::warn!(%error, "no host memory for KV blocks: lower `[executor] swap_bytes` or raise `ulimit -l`");
                None
            }
        };
        let written = vec![false; if memory.is_some() { count } else { 0 }];
        Self { memory, written, page_bytes }
    }

    /// Pages.
    pub fn count(&self) -> u32 {
        u32::try_from(self.written.len()).unwrap_or(u32::MAX)
    }

    /// Makes one copy. `blocks`: size of the pool.
    pub fn copy<B: Backend>(
        &mut self,
        backend: &B,
        caches: &mut [B::KvCache],
        blocks: u32,
        copy: &BlockCopy,
    ) -> Result<(), Broken> {
        let (BlockCopy::Out { block, page } | BlockCopy::In { page, block }) = *copy;
        if block.0 >= blocks {
            return Err(broken(format!("copy of block {} of a pool of {blocks}", block.0)));
        }
        let (pages, at) = (self.written.len(), page as usize);
        let (Some(memory), Some(written)) = (&mut self.memory, self.written.get_mut(at)) else {
            return Err(broken(format!("host page {page} of {pages}")));
        };
        let offset = at * self.page_bytes;
        match copy {
            BlockCopy::Out { .. } => {
                backend.read_kv_block(caches, block.0, memory, offset)?;
                *written = true;
            }
            BlockCopy::In { .. } if !*written => {
                return Err(broken(format!("host page {page} was never written")));
            }
            BlockCopy::In { .. } => backend.write_kv_block(caches, block.0, memory, offset)?,
        }
        Ok(())
    }
}
