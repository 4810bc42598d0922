//! From a page of patches to the pixels that the vision tower takes.

use bytes::Bytes;
use half::bf16;
use millrace_protocol::ready::MediaItem;
use millrace_protocol::{ErrorCode, JobError, PageDtype, PageRef};

use crate::layers::vision::PatchGrid;
use crate::models::PatchSpec;

/// Where an engine gets pages from.
pub trait MediaSource {
    /// All bytes of `page`, checked against its hash.
    ///
    /// # Errors
    /// What the sequence that needs the page fails with.
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError>;
}

/// Pixels of `item` from its page's `bytes`. A still stored with one temporal slot is repeated in time.
pub(super) fn patch_grid(item: &MediaItem, bytes: &Bytes, spec: &PatchSpec) -> Result<PatchGrid, JobError> {
    let rows = item.grid_h as usize * item.grid_w as usize;
    let slots = item.patches.shape.get(2).map_or(0, |slots| *slots as usize);
    let expected = [rows, spec.channels, slots, spec.patch, spec.patch];
    let shape: Vec<usize> = item.patches.shape.iter().map(|size| *size as usize).collect();
    let elements: usize = expected.iter().product();
    if shape != expected || (slots != 1 && slots != spec.temporal) {
        let what = format!("patches of shape {shape:?} for a grid of {} x {}", item.grid_h, item.grid_w);
        return Err(JobError::new(ErrorCode::MediaMismatch, what));
    }
    if bytes.len() != elements * item.patches.dtype.size_bytes() {
        let what = format!("a page of {} bytes for {elements} elements", bytes.len());
        return Err(JobError::new(ErrorCode::MediaMismatch, what));
    }
    let frames = floats(bytes, item.patches.dtype);
    let pixels = if slots == spec.temporal { frames } else { repeat(&frames, spec) };
    Ok(PatchGrid { grid_h: item.grid_h, grid_w: item.grid_w, pixels })
}

fn floats(bytes: &[u8], dtype: PageDtype) -> Vec<f32> {
    match dtype {
        PageDtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        PageDtype::Bf16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
    }
}

/// `[.., 1, p, p]` -> `[.., temporal, p, p]`.
fn repeat(frames: &[f32], spec: &PatchSpec) -> Vec<f32> {
    let mut pixels = Vec::with_capacity(frames.len() * spec.temporal);
    for frame in frames.chunks(spec.patch * spec.patch) {
        for _ in 0..spec.temporal {
            pixels.extend_from_slice(frame);
        }
    }
    pixels
}
