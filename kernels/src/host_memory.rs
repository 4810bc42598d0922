//! Host memory that a device copies to and from in the order of its work: page-locked where that matters. Nobody waits for a
//! copy but who wants to see the bytes.

use crate::error::KernelError;
use crate::view::shape_error;

/// A buffer of fixed size, zero at first.
#[derive(Debug)]
pub struct HostMemory(Store);

#[derive(Debug)]
enum Store {
    /// Ordinary memory; pages that nobody touched take none.
    Plain(Box<[u8]>),
    #[cfg(feature = "cuda")]
    Pinned(crate::cuda::Pinned),
}

impl HostMemory {
    /// Ordinary memory.
    pub fn plain(bytes: usize) -> Self {
        Self(Store::Plain(vec![0; bytes].into()))
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn pinned(memory: crate::cuda::Pinned) -> Self {
        Self(Store::Pinned(memory))
    }

    /// The page-locked buffer behind it, if it is one.
    #[cfg(feature = "cuda")]
    pub(crate) fn as_pinned(&mut self) -> Option<&mut crate::cuda::Pinned> {
        match &mut self.0 {
            Store::Plain(_) => None,
            Store::Pinned(memory) => Some(memory),
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        match &self.0 {
            Store::Plain(bytes) => bytes.len(),
            #[cfg(feature = "cuda")]
            Store::Pinned(memory) => memory.bytes(),
        }
    }

    /// `bytes` bytes from `offset` on, once every copy that uses them is done.
    ///
    /// # Errors
    /// They are not there, or a copy failed.
    pub fn part(&mut self, offset: usize, bytes: usize) -> Result<&mut [u8], KernelError> {
        self.check(offset, bytes)?;
        let all = match &mut self.0 {
            Store::Plain(all) => &mut all[..],
            #[cfg(feature = "cuda")]
            Store::Pinned(memory) => memory.open()?,
        };
        Ok(&mut all[offset..offset + bytes])
    }

    /// Errors unless `bytes` bytes from `offset` on are there.
    pub(crate) fn check(&self, offset: usize, bytes: usize) -> Result<(), KernelError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(shape_error("host_memory", format!("{bytes} bytes at {offset} of {}", self.size()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_checked() {
        let mut memory = HostMemory::plain(8);
        memory.part(2, 3).unwrap().copy_from_slice(&[1, 2, 3]);
        assert_eq!(memory.part(0, 8).unwrap(), [0, 0, 1, 2, 3, 0, 0, 0]);
        assert!(memory.part(8, 0).is_ok());
        for (offset, bytes) in [(8, 1), (0, 9), (usize::MAX, 2)] {
            assert!(memory.part(offset, bytes).is_err());
        }
    }
}
