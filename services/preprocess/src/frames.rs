//! Frames of one video on their way into patches, `temporal` frames to a group. The last frame fills up the last group.

use std::borrow::Cow;
use std::sync::Arc;

use millrace_protocol::{ErrorCode, JobError, PageDtype};
use rayon::prelude::*;

use crate::patchify::{PatchLayout, Patchifier, Rgb};
use crate::processor_config::VideoSettings;
use crate::smart_resize::video_size;

/// A video as the model takes it.
#[derive(Clone, PartialEq)]
pub struct VideoPatches {
    /// Patches down.
    pub grid_h: u32,
    /// Patches across.
    pub grid_w: u32,
    /// Patches of each temporal group.
    pub groups: Vec<Vec<u8>>,
    /// Text of each group's time, as it stands in the prompt.
    pub times: Vec<String>,
}

/// Takes frames in order. Built for their size and number, which decide the target size.
pub struct FrameWriter {
    patchifier: Arc<Patchifier>,
    temporal: usize,
    expected: usize,
    written: usize,
    groups: Vec<Vec<u8>>,
}

impl FrameWriter {
    /// For `count` frames of `size` (height, width); refuses what would exceed `most_bytes` of patches.
    ///
    /// # Errors
    /// `too_large`, or the reference's refusals of sizes.
    pub fn new(
        size: (u32, u32),
        count: u32,
        settings: &VideoSettings,
        dtype: PageDtype,
        most_bytes: u64,
    ) -> Result<Self, JobError> {
        let pixels = &settings.pixels;
        let target = video_size(count, size.0, size.1, pixels.temporal, settings.bounds(count))?;
        let temporal = pixels.temporal as usize;
        let layout = PatchLayout { patch: pixels.patch as usize, merge: pixels.merge as usize, slots: temporal };
        let groups = (count as usize).div_ceil(temporal);
        let bytes = (layout.elements(target.0, target.1) * dtype.size_bytes()) as u64 * groups as u64;
        if bytes > most_bytes {
            let text = format!(
                "the video becomes {bytes} bytes of patches; {most_bytes} are left for it: send fewer or smaller frames"
            );
            return Err(JobError::new(ErrorCode::TooLarge, text));
        }
        let patchifier = Arc::new(Patchifier::new(size, target, layout, pixels.mean, pixels.std, dtype));
        Ok(Self { patchifier, temporal, expected: count as usize, written: 0, groups: Vec::new() })
    }

    /// Writes the next frame on a thread where work may take long; gives the buffer back.
    ///
    /// # Errors
    /// `internal` if the frame has another size than announced.
    pub async fn write(&mut self, frame: Vec<u8>) -> Result<Vec<u8>, JobError> {
        let (slot, mut group) = self.next_group();
        let patchifier = Arc::clone(&self.patchifier);
        let last = self.written + 1 == self.expected;
        let temporal = self.temporal;
        let work = move || {
            let fits = write_slots(&patchifier, &frame, slot, last, temporal, &mut group);
            (fits, frame, group)
        };
        let (fits, frame, group) = tokio::task::spawn_blocking(work).await.map_err(|_| misfit())?;
        self.keep(fits, group)?;
        Ok(frame)
    }

    /// All frames, groups side by side on this machine's cores: `frame` gives frame `n`, for each `n` once. Only the frames of
    /// the groups at work are in memory.
    ///
    /// # Errors
    /// That of the first frame that `frame` has none for; `internal` if a frame has another size than announced, or if frames
    /// were written before.
    pub fn write_all<'f>(
        &mut self,
        frame: impl Fn(usize) -> Result<Cow<'f, Rgb>, JobError> + Sync,
    ) -> Result<(), JobError> {
        if self.written > 0 {
            return Err(misfit());
        }
        let group = |index: usize| {
            let mut group = vec![0; self.patchifier.output_bytes()];
            let first = index * self.temporal;
            for n in first..(first + self.temporal).min(self.expected) {
                let last = n + 1 == self.expected;
                if !write_slots(&self.patchifier, &frame(n)?.pixels, n - first, last, self.temporal, &mut group) {
                    return Err(misfit());
                }
            }
            Ok(group)
        };
        let made: Vec<_> = (0..self.expected.div_ceil(self.temporal)).into_par_iter().map(group).collect();
        self.groups = made.into_iter().collect::<Result<_, _>>()?;
        self.written = self.expected;
        Ok(())
    }

    /// The finished video; `times` has one text per group.
    ///
    /// # Errors
    /// `internal` if frames or times are missing.
    pub fn finish(self, times: Vec<String>) -> Result<VideoPatches, JobError> {
        if self.written != self.expected || times.len() != self.groups.len() {
            return Err(misfit());
        }
        let (grid_h, grid_w) = self.patchifier.grid();
        Ok(VideoPatches { grid_h, grid_w, groups: self.groups, times })
    }

    fn next_group(&mut self) -> (usize, Vec<u8>) {
        let slot = self.written % self.temporal;
        let open = if slot == 0 { None } else { self.groups.pop() };
        (slot, open.unwrap_or_else(|| vec![0; self.patchifier.output_bytes()]))
    }

    fn keep(&mut self, fits: bool, group: Vec<u8>) -> Result<(), JobError> {
        self.groups.push(group);
        self.written += 1;
        if fits && self.written <= self.expected { Ok(()) } else { Err(misfit()) }
    }
}

/// Writes a frame into its slot and, if it is the last, into the slots left over.
fn write_slots(
    patchifier: &Patchifier,
    frame: &[u8],
    slot: usize,
    last: bool,
    temporal: usize,
    group: &mut [u8],
) -> bool {
    let end = if last { temporal } else { slot + 1 };
    (slot..end).all(|slot| patchifier.write(frame, slot, group))
}

fn misfit() -> JobError {
    JobError::new(
        ErrorCode::Internal,
        "a video's frames do not have the size or number that was announced; report it with the job",
    )
}
