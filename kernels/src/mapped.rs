//! A file mapped into memory, read-only, behind a safe face: here because mapping is `unsafe` and only this crate may be.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

/// A mapped file. Its pages are read when they are touched and belong to the system's page cache.
#[derive(Debug)]
pub struct MappedFile {
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps all of `path`. The file must not be changed in place while it is mapped; replacing it is fine.
    ///
    /// # Errors
    /// If it cannot be opened or mapped.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        // The system maps no empty file.
        if file.metadata()?.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the mapping is read-only and private to this value, which hands out shared slices bound to its life.
        // What the compiler cannot see, that nobody truncates or rewrites the file meanwhile, is the documented
        // condition on checkpoints.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map: Some(map) })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}
