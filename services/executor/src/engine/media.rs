//! From a page of patches to the pixels that the vision tower takes.

use bytes::Bytes;
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

/// Pixels of `item`: its page's `bytes`, checked. A still has one temporal slot, which the backend repeats.
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
    let (grid_h, grid_w, dtype, normalise) = (item.grid_h, item.grid_w, item.patches.dtype, item.normalise);
    if (dtype == PageDtype::U8) != normalise.is_some() || (normalise.is_some() && spec.channels != 3) {
        let what = format!("{dtype:?} patches of {} channels with normalisation {normalise:?}", spec.channels);
        return Err(JobError::new(ErrorCode::MediaMismatch, what));
    }
    Ok(PatchGrid { grid_h, grid_w, bytes: bytes.clone(), dtype, slots, normalise })
}
