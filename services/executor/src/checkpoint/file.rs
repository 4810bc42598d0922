//! One safetensors file, mapped into memory: its header is parsed, its tensors stay in the system's page cache until they are
//! taken.

use std::ops::Range;
use std::path::{Path, PathBuf};

use millrace_kernels::MappedFile;
use safetensors::tensor::Metadata;

use crate::error::ExecutorError;

/// Longest header that is believed, in bytes (the format's own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open weight file.
#[derive(Debug)]
pub(super) struct WeightFile {
    path: PathBuf,
    map: MappedFile,
    data_start: usize,
}

impl WeightFile {
    /// Maps `path` and reads its header.
    ///
    /// # Errors
    /// The file cannot be read, its header is broken, or it is cut short.
    pub(super) fn open(path: PathBuf) -> Result<(Self, Metadata), ExecutorError> {
        let malformed = |what: String| ExecutorError::Malformed { path: path.clone(), what };
        let map = MappedFile::open(&path).map_err(|source| ExecutorError::Io { path: path.clone(), source })?;
        let bytes = map.bytes().len() as u64;
        let (length, rest) =
            map.bytes().split_first_chunk::<8>().ok_or_else(|| malformed(format!("{bytes} bytes are no header")))?;
        let header_bytes = u64::from_le_bytes(*length);
        let header = usize::try_from(header_bytes.min(MAX_HEADER_BYTES + 1)).ok().and_then(|end| rest.get(..end));
        let header = header.filter(|_| header_bytes <= MAX_HEADER_BYTES);
        let header =
            header.ok_or_else(|| malformed(format!("a header of {header_bytes} bytes in a file of {bytes}")))?;
        let metadata: Metadata = serde_json::from_slice(header).map_err(|error| malformed(error.to_string()))?;
        let data_start = 8 + header.len();
        let expected = (data_start + metadata.data_len()) as u64;
        if expected != bytes {
            return Err(malformed(format!("{bytes} bytes where the header asks for {expected}")));
        }
        Ok((Self { path, map, data_start }, metadata))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        self.map.bytes()
    }

    /// The mapping, and where bytes `start..end` of the tensors' part are in it.
    pub(super) fn data(&self, start: usize, end: usize) -> Result<(&MappedFile, Range<usize>), ExecutorError> {
        let range = self.data_start.saturating_add(start)..self.data_start.saturating_add(end);
        let what = || format!("no bytes {start} to {end}");
        let malformed = || ExecutorError::Malformed { path: self.path.clone(), what: what() };
        self.map.bytes().get(range.clone()).map(|_| (&self.map, range)).ok_or_else(malformed)
    }
}
