//! A file mapped into memory, read-only, behind a safe face: here because mapping is `unsafe` and only this crate may be.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Tensor, WithDType};
use half::{bf16, f16};
use memmap2::Mmap;

use crate::error::KernelError;
use crate::view::{shape_error, tensor_of};

/// Bytes copied at once out of a mapping: what is resident twice while a checkpoint is loaded.
const PIECE_BYTES: usize = 8 << 20;

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

    /// Lets go of the pages of `range`, which the system keeps cached: touched again, they come back.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            // SAFETY: the mapping is of a file and read-only, so dropped pages hold nothing that the file does not.
            let released = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.end - range.start)
            };
            // Advice: a system that refuses it merely keeps the pages longer.
            drop(released);
        }
    }

    /// Copies `range` behind what `out` holds, letting go of the file's pages on the way. `T` must be a plain number.
    fn read<T: WithDType>(&self, range: &Range<usize>, out: &mut Vec<T>) {
        let piece = PIECE_BYTES / size_of::<T>() * size_of::<T>();
        for start in range.clone().step_by(piece) {
            let here = start..range.end.min(start + piece);
            let bytes = &self.bytes()[here.clone()];
            let count = bytes.len() / size_of::<T>();
            out.reserve(count);
            // SAFETY: room for `count` more elements was just reserved, the source has their bytes, and every pattern of bits
            // is a number of the types that `mapped_tensor` asks for.
            unsafe {
                let end = out.as_mut_ptr().add(out.len()).cast::<u8>();
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), end, count * size_of::<T>());
                out.set_len(out.len() + count);
            }
            self.release(&here);
        }
    }
}

/// Bytes of mapped files, one piece behind the other, as one host tensor of `shape`. Copied once; the pages of the files do not
/// stay in this process's memory, so that loading a checkpoint takes its size and not twice that.
///
/// # Errors
/// Pieces that do not fill `shape` or lie outside their files; a dtype other than F32, F16 and BF16.
pub fn mapped_tensor(
    pieces: &[(&MappedFile, Range<usize>)],
    dtype: DType,
    shape: &[usize],
) -> Result<Tensor, KernelError> {
    match dtype {
        DType::F32 => read::<f32>(pieces, shape),
        DType::F16 => read::<f16>(pieces, shape),
        DType::BF16 => read::<bf16>(pieces, shape),
        other => Err(KernelError::Dtype { op: "mapped_tensor", dtype: format!("{other:?}") }),
    }
}

/// The elements of `shape`, which `pieces` of `size` bytes an element must fill.
pub(crate) fn check_pieces(
    pieces: &[(&MappedFile, Range<usize>)],
    size: usize,
    shape: &[usize],
) -> Result<usize, KernelError> {
    let op = "mapped_tensor";
    let mut bytes = 0;
    for (file, range) in pieces {
        if file.bytes().get(range.clone()).is_none() || range.len() % size != 0 {
            return Err(shape_error(op, format!("bytes {range:?} of a file of {}", file.bytes().len())));
        }
        bytes += range.len();
    }
    let count = shape.iter().product::<usize>();
    if bytes != count * size {
        return Err(shape_error(op, format!("{bytes} bytes for shape {shape:?}")));
    }
    Ok(count)
}

fn read<T: WithDType>(pieces: &[(&MappedFile, Range<usize>)], shape: &[usize]) -> Result<Tensor, KernelError> {
    let count = check_pieces(pieces, size_of::<T>(), shape)?;
    let mut values = Vec::<T>::with_capacity(count);
    for (file, range) in pieces {
        file.read(range, &mut values);
    }
    tensor_of(values, shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_two_files_become_one_tensor() {
        let folder = std::env::temp_dir().join(format!("millrace-mapped-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        // Longer than one copy, at an odd place in the file.
        let values: Vec<bf16> = (0..(PIECE_BYTES / 2 + 77)).map(|i| bf16::from_bits(i as u16)).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
        std::fs::write(folder.join("a"), [&[1, 2, 3], bytes.as_slice()].concat()).unwrap();
        std::fs::write(folder.join("b"), &bytes[..8]).unwrap();
        let (a, b) = (MappedFile::open(&folder.join("a")).unwrap(), MappedFile::open(&folder.join("b")).unwrap());
        let all = 3..3 + bytes.len();
        let joined = mapped_tensor(&[(&b, 2..8), (&a, all.clone())], DType::BF16, &[values.len() + 3]).unwrap();
        let joined: Vec<bf16> = joined.to_vec1().unwrap();
        let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&joined[..3]), bits(&values[1..4]));
        assert!(bits(&joined[3..]) == bits(&values));
        assert_eq!(&a.bytes()[all.clone()], bytes, "pages that were let go come back");

        for (pieces, shape) in [(vec![(&b, 0..8)], vec![3]), (vec![(&b, 0..7)], vec![3]), (vec![(&b, 4..12)], vec![4])]
        {
            assert!(mapped_tensor(&pieces, DType::BF16, &shape).is_err(), "{shape:?}");
        }
        assert!(mapped_tensor(&[(&b, 0..8)], DType::U8, &[8]).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// Kilobytes of mapped files that are resident.
    #[cfg(target_os = "linux")]
    fn resident_file_kb() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_that_was_copied_does_not_stay_resident() {
        let path = std::env::temp_dir().join(format!("millrace-resident-{}", std::process::id()));
        let bytes = 8 * PIECE_BYTES + 1001 * 4;
        std::fs::write(&path, vec![7u8; bytes]).unwrap();
        let file = MappedFile::open(&path).unwrap();
        let before = resident_file_kb();
        mapped_tensor(&[(&file, 0..bytes)], DType::F32, &[bytes / 4]).unwrap();
        let kept = resident_file_kb().saturating_sub(before);
        assert!(kept < bytes as u64 / 2048, "{kept} kB of {bytes} bytes stay resident");
        std::hint::black_box(file.bytes()[0]);
        std::fs::remove_file(&path).unwrap();
    }
}
