//! One safetensors file: its header in memory, its tensors on disk until they are read. Reads at offsets instead of a
//! mapping: this crate holds no `unsafe`, and each tensor is read once, so a mapping would save nothing but a copy.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;

use crate::error::ExecutorError;

/// Longest header that is believed, in bytes (the format's own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open weight file.
#[derive(Debug)]
pub(super) struct WeightFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    data_start: u64,
}

impl WeightFile {
    /// Opens `path` and reads its header.
    ///
    /// # Errors
    /// The file cannot be read, its header is broken, or it is cut short.
    pub(super) fn open(path: PathBuf) -> Result<(Self, Metadata), ExecutorError> {
        let io = |source| ExecutorError::Io { path: path.clone(), source };
        let malformed = |what: String| ExecutorError::Malformed { path: path.clone(), what };
        let file = File::open(&path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES.min(bytes.saturating_sub(8)) {
            return Err(malformed(format!("a header of {header_bytes} bytes in a file of {bytes}")));
        }
        let mut header = vec![0; usize::try_from(header_bytes).unwrap_or(0)];
        file.read_exact_at(&mut header, 8).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| malformed(error.to_string()))?;
        let data_start = 8 + header_bytes;
        let expected = data_start + metadata.data_len() as u64;
        if expected != bytes {
            return Err(malformed(format!("{bytes} bytes where the header asks for {expected}")));
        }
        Ok((Self { path, file, bytes, data_start }, metadata))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes `start..end` of the tensors' part.
    pub(super) fn data(&self, start: usize, end: usize) -> Result<Vec<u8>, ExecutorError> {
        self.read(self.data_start + start as u64, end.saturating_sub(start))
    }

    /// `length` bytes from `offset` of the file.
    pub(super) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, ExecutorError> {
        let mut bytes = vec![0; length];
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|source| ExecutorError::Io { path: self.path.clone(), source })?;
        Ok(bytes)
    }
}
