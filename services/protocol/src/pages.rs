//! Tensor pages on the wire: references that travel in messages instead of pixels, and how to read them.

use serde::{Deserialize, Serialize};

use crate::ids::{ActorId, JobId};

/// Element type of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PageDtype {
    /// bfloat16, little endian.
    Bf16,
    /// IEEE float32, little endian.
    F32,
    /// One byte: a colour sample before normalisation.
    U8,
}

impl PageDtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            PageDtype::Bf16 => 2,
            PageDtype::F32 => 4,
            PageDtype::U8 => 1,
        }
    }
}

/// A tensor that lives in some node's pager. The reference is small; the node holds the bytes until the
/// job's lease is released or runs out.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRef {
    /// Pager that holds the page.
    pub node: ActorId,
    /// Number of the page in that pager; never used twice.
    pub page: u64,
    /// Element type.
    pub dtype: PageDtype,
    /// Shape, outermost first.
    pub shape: Vec<u32>,
    /// Length in bytes.
    pub bytes: u64,
    /// First 16 bytes of the content's BLAKE3 hash: checked after every read, key of the encoder cache.
    pub hash: [u8; 16],
}

/// Request for a piece of a page. The reply is the raw bytes, or an error header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRead {
    /// Page number.
    pub page: u64,
    /// First byte.
    pub offset: u64,
    /// Most bytes to send.
    pub length: u32,
}

/// What happens to a job's pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageLease {
    /// These jobs still run: keep their pages.
    Renew(Vec<JobId>),
    /// This job ended: free its pages.
    Release(JobId),
}
