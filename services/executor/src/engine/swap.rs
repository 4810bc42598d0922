//! Host memory for KV blocks that left the pool: numbered pages, copied bit by bit, all layers of a block in one page.
//! Whether copying pays is the scheduler's decision.

use millrace_kernels::Backend;
use millrace_protocol::plan::BlockCopy;

use super::{Broken, broken};

/// Pages of host memory. A page takes memory from its first use on.
#[derive(Debug, Default)]
pub(super) struct HostPages {
    pages: Vec<Box<[u8]>>,
}

impl HostPages {
    /// As many pages as `bytes` holds. None if the backend cannot copy blocks.
    pub fn new<B: Backend>(backend: &B, caches: &[B::KvCache], bytes: u64) -> Self {
        let block = caches.iter().map(|cache| backend.kv_block_bytes(cache)).sum::<usize>() as u64;
        let count = bytes.checked_div(block).unwrap_or(0).min(u64::from(u32::MAX));
        Self { pages: vec![Box::default(); usize::try_from(count).unwrap_or(0)] }
    }

    /// Pages.
    pub fn count(&self) -> u32 {
        u32::try_from(self.pages.len()).unwrap_or(u32::MAX)
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
        let pages = self.pages.len();
        let Some(bytes) = self.pages.get_mut(page as usize) else {
            return Err(broken(format!("host page {page} of {pages}")));
        };
        let sizes: Vec<usize> = caches.iter().map(|cache| backend.kv_block_bytes(cache)).collect();
        match copy {
            BlockCopy::Out { .. } => {
                if bytes.is_empty() {
                    *bytes = vec![0; sizes.iter().sum()].into();
                }
                let mut rest = &mut bytes[..];
                for (cache, size) in caches.iter().zip(sizes) {
                    let (mine, others) = rest.split_at_mut(size);
                    backend.read_kv_block(cache, block.0, mine)?;
                    rest = others;
                }
            }
            BlockCopy::In { .. } if bytes.is_empty() => {
                return Err(broken(format!("host page {page} was never written")));
            }
            BlockCopy::In { .. } => {
                let mut rest = &bytes[..];
                for (cache, size) in caches.iter_mut().zip(sizes) {
                    let (mine, others) = rest.split_at(size);
                    backend.write_kv_block(cache, block.0, mine)?;
                    rest = others;
                }
            }
        }
        Ok(())
    }
}
