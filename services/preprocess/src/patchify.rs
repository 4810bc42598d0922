//! Resize, normalise and patchify in one pass: RGB rows go through the integer resampler and straight into the
//! patch order of the reference, without an image-sized buffer in between.
//!
//! The work is cut into bands of `patch * merge` output rows, each of which is one contiguous piece of the output.
//! Within a run of bands the horizontally resampled rows that two neighbours share are kept.

use millrace_protocol::PageDtype;
use rayon::prelude::*;

use crate::normalise::Table;
use crate::resample::{BLOCK_ROWS, Taps, blend_rows, resample_block};

/// An RGB image: 8 bits a sample, rows top to bottom, no padding.
#[derive(Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `height * width * 3` bytes.
    pub pixels: Vec<u8>,
}

impl std::fmt::Debug for Rgb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rgb({} x {})", self.width, self.height)
    }
}

/// How patches are laid out: `[grid_h*grid_w, 3, slots, patch, patch]`, in groups of `merge` x `merge` neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchLayout {
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Patches that are merged into one token, along each side.
    pub merge: usize,
    /// Frames in a patch: 1 for stills, the temporal patch size for video.
    pub slots: usize,
}

impl PatchLayout {
    fn band_rows(self) -> usize {
        self.patch * self.merge
    }

    /// Elements of `height` x `width` pixels (both multiples of `patch * merge`).
    pub fn elements(self, height: u32, width: u32) -> usize {
        height as usize * width as usize * 3 * self.slots
    }
}

/// Below this many output samples one thread is quicker than several.
const PARALLEL_SAMPLES: usize = 1 << 20;

/// Turns frames of one size into patches. Build it once per size, then write any number of frames.
pub struct Patchifier {
    source: (usize, usize),
    target: (usize, usize),
    horizontal: Option<Taps>,
    vertical: Option<Taps>,
    layout: PatchLayout,
    table: Table,
    dtype: PageDtype,
    arch: pulp::Arch,
}

impl Patchifier {
    /// From frames of `source` (height, width) to `target` (height, width, multiples of `patch * merge`).
    pub fn new(
        source: (u32, u32),
        target: (u32, u32),
        layout: PatchLayout,
        mean: [f32; 3],
        std: [f32; 3],
        dtype: PageDtype,
    ) -> Self {
        Self {
            source: (source.0 as usize, source.1 as usize),
            target: (target.0 as usize, target.1 as usize),
            horizontal: Taps::new(source.1, target.1),
            vertical: Taps::new(source.0, target.0),
            layout,
            table: Table::new(mean, std, dtype),
            dtype,
            arch: pulp::Arch::new(),
        }
    }

    /// Patches down and across.
    pub fn grid(&self) -> (u32, u32) {
        ((self.target.0 / self.layout.patch) as u32, (self.target.1 / self.layout.patch) as u32)
    }

    /// Bytes of one output buffer.
    pub fn output_bytes(&self) -> usize {
        self.target.0 * self.target.1 * 3 * self.layout.slots * self.dtype.size_bytes()
    }

    /// Writes one frame into slot `slot` of `out`, which is [`Patchifier::output_bytes`] long. Other slots are not touched.
    ///
    /// `false`: `pixels`, `slot` or `out` does not have the size this was built for; nothing was written.
    #[must_use]
    pub fn write(&self, pixels: &[u8], slot: usize, out: &mut [u8]) -> bool {
        let fits = pixels.len() == self.source.0 * self.source.1 * 3
            && slot < self.layout.slots
            && out.len() == self.output_bytes();
        if !fits || out.is_empty() {
            return fits;
        }
        let band_bytes = self.band_bytes();
        let bands = out.len() / band_bytes;
        let samples = self.target.0 * self.target.1 * 3;
        let threads = if samples < PARALLEL_SAMPLES { 1 } else { rayon::current_num_threads() };
        let run = bands.div_ceil(threads).max(1);
        let runs = out.par_chunks_mut(run * band_bytes).enumerate();
        if threads == 1 {
            self.arch.dispatch(Bands { job: self, pixels, slot, first: 0, out });
        } else {
            runs.for_each(|(index, piece)| {
                self.arch.dispatch(Bands { job: self, pixels, slot, first: index * run, out: piece })
            });
        }
        true
    }

    fn band_bytes(&self) -> usize {
        self.layout.band_rows() * self.target.1 * 3 * self.layout.slots * self.dtype.size_bytes()
    }

    /// Bands from `first` on, as many as `out` holds.
    #[inline(always)]
    fn write_bands(&self, pixels: &[u8], slot: usize, first: usize, out: &mut [u8]) {
        let mut rows = RowCache::new(pixels, self);
        let mut line = vec![0u8; self.target.1 * 3];
        for (index, band) in out.chunks_exact_mut(self.band_bytes()).enumerate() {
            let top = (first + index) * self.layout.band_rows();
            let bottom = top + self.layout.band_rows();
            rows.load(self.vertical.as_ref().map_or(top..bottom, |taps| taps.inputs(top, bottom)));
            for y in top..bottom {
                let finished: &[u8] = match &self.vertical {
                    None => rows.row(y),
                    Some(taps) => {
                        let (from, weights) = taps.at(y);
                        blend_rows(|j| rows.row(from + j), weights, taps.precision, &mut line);
                        &line
                    }
                };
                let row = y - top;
                match (&self.table, self.layout.patch) {
                    (Table::Bf16(table), 16) => scatter::<2, 16>(finished, row, self.layout, slot, table, band),
                    (Table::F32(table), 16) => scatter::<4, 16>(finished, row, self.layout, slot, table, band),
                    (Table::U8(table), 16) => scatter::<1, 16>(finished, row, self.layout, slot, table, band),
                    (Table::Bf16(table), _) => scatter::<2, 0>(finished, row, self.layout, slot, table, band),
                    (Table::F32(table), _) => scatter::<4, 0>(finished, row, self.layout, slot, table, band),
                    (Table::U8(table), _) => scatter::<1, 0>(finished, row, self.layout, slot, table, band),
                }
            }
        }
    }
}

/// One run of bands. A type of its own, because the work is compiled for the machine's vector instructions only if it is
/// inlined into the dispatch, which cannot be asked of a closure.
struct Bands<'a> {
    job: &'a Patchifier,
    pixels: &'a [u8],
    slot: usize,
    first: usize,
    out: &'a mut [u8],
}

impl pulp::NullaryFnOnce for Bands<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.job.write_bands(self.pixels, self.slot, self.first, self.out);
    }
}

/// Writes row `y` of a band into its patches. `SIDE` is the patch side if it is known at compile time, which unrolls the
/// innermost loop, or 0.
#[inline(always)]
fn scatter<const N: usize, const SIDE: usize>(
    line: &[u8],
    y: usize,
    layout: PatchLayout,
    slot: usize,
    table: &[[[u8; N]; 256]; 3],
    band: &mut [u8],
) {
    let PatchLayout { merge, slots, .. } = layout;
    let patch = if SIDE > 0 { SIDE } else { layout.patch };
    let plane = patch * patch * N;
    let patch_bytes = 3 * slots * plane;
    let (block_row, patch_row) = (y / patch, y % patch);
    for (column, pixels) in line.chunks_exact(patch * 3).enumerate() {
        let index = ((column / merge) * merge + block_row) * merge + column % merge;
        let target = &mut band[index * patch_bytes..][..patch_bytes];
        for (channel, values) in table.iter().enumerate() {
            let run = &mut target[(channel * slots + slot) * plane + patch_row * patch * N..][..patch * N];
            for (to, pixel) in run.as_chunks_mut::<N>().0.iter_mut().zip(pixels.as_chunks::<3>().0) {
                *to = values[usize::from(pixel[channel])];
            }
        }
    }
}

/// Input rows at the target's width: the source itself if the width is unchanged, else a window of resampled rows.
struct RowCache<'a> {
    pixels: &'a [u8],
    in_width: usize,
    out_width: usize,
    taps: Option<&'a Taps>,
    /// Rows `first..first + held`, resampled.
    window: Vec<u8>,
    first: usize,
    held: usize,
    columns: Vec<u8>,
}

impl<'a> RowCache<'a> {
    fn new(pixels: &'a [u8], job: &'a Patchifier) -> Self {
        let (in_width, out_width) = (job.source.1, job.target.1);
        Self {
            pixels,
            in_width,
            out_width,
            taps: job.horizontal.as_ref(),
            window: Vec::new(),
            first: 0,
            held: 0,
            columns: Vec::new(),
        }
    }

    /// Makes `wanted` available; its start never goes back.
    #[inline(always)]
    fn load(&mut self, wanted: std::ops::Range<usize>) {
        let Some(taps) = self.taps else { return };
        let stride = self.out_width * 3;
        let kept = (self.first + self.held).saturating_sub(wanted.start).min(self.held);
        self.window.copy_within((self.held - kept) * stride..self.held * stride, 0);
        (self.first, self.held) = (wanted.start, kept);
        self.window.resize(wanted.len().max(kept) * stride, 0);
        while self.first + self.held < wanted.end {
            let from = self.first + self.held;
            let count = (wanted.end - from).min(BLOCK_ROWS);
            let rows = &self.pixels[from * self.in_width * 3..(from + count) * self.in_width * 3];
            let out = &mut self.window[self.held * stride..(self.held + count) * stride];
            resample_block(rows, self.in_width, taps, self.out_width, &mut self.columns, out);
            self.held += count;
        }
    }

    #[inline(always)]
    fn row(&self, y: usize) -> &[u8] {
        let (data, index, width) = match self.taps {
            None => (self.pixels, y, self.in_width),
            Some(_) => (self.window.as_slice(), y - self.first, self.out_width),
        };
        &data[index * width * 3..(index + 1) * width * 3]
    }
}
