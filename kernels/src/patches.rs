//! Patches as pages hold them, on their way to the vision tower: normalised already, or samples that the device normalises.
//! The CPU's side of [`crate::Backend::patches`].

use candle_core::DType;

use crate::error::KernelError;
use crate::view::shape_error;

/// Patches of one item as its page holds them, little-endian: `[rows, channels, slots, area]`.
#[derive(Debug, Clone, Copy)]
pub struct PatchPage<'a> {
    /// All elements.
    pub bytes: &'a [u8],
    /// BF16 or F32 where they are normalised; U8 where they are samples.
    pub dtype: DType,
    /// Patches.
    pub rows: usize,
    /// Colour channels.
    pub channels: usize,
    /// Frames that are stored: one for a still, else all that a patch has.
    pub slots: usize,
    /// Pixels of one frame of a patch.
    pub area: usize,
    /// Mean and deviation of the three channels, with samples and only with them: `(x - 255 mean) / (255 std)`, each operation
    /// rounded to f32.
    pub normalise: Option<([f32; 3], [f32; 3])>,
}

impl PatchPage<'_> {
    /// Errors unless the bytes are as many as the sizes say and frames can be repeated `temporal` times or are all there.
    pub(crate) fn check(&self, temporal: usize) -> Result<(), KernelError> {
        let elements = self.rows * self.channels * self.slots * self.area;
        if self.bytes.len() != elements * self.dtype.size_in_bytes() || (self.slots != 1 && self.slots != temporal) {
            let Self { bytes, rows, channels, slots, area, .. } = self;
            let what = format!("{} bytes for {rows} x {channels} x {slots} x {area} of {temporal}", bytes.len());
            return Err(shape_error("patches", what));
        }
        if self.normalise.is_some() != (self.dtype == DType::U8) {
            let what = format!("{:?} with normalisation {:?}", self.dtype, self.normalise);
            return Err(shape_error("patches", what));
        }
        if self.normalise.is_some() && self.channels != 3 {
            return Err(shape_error("patches", format!("samples of {} channels", self.channels)));
        }
        Ok(())
    }

    /// What is subtracted from a channel's samples, and what divides the difference.
    pub(crate) fn shift_and_scale(&self) -> Option<([f32; 3], [f32; 3])> {
        self.normalise.map(|(mean, std)| (mean.map(|mean| mean * 255.0), std.map(|std| std * 255.0)))
    }

    /// Samples as f32, each value of a channel computed once.
    fn normalised(&self) -> Vec<f32> {
        let Some((shift, scale)) = self.shift_and_scale() else { return Vec::new() };
        let table =
            |channel: usize| -> [f32; 256] { std::array::from_fn(|x| (x as f32 - shift[channel]) / scale[channel]) };
        let tables = [0, 1, 2].map(table);
        let planes = self.bytes.chunks((self.slots * self.area).max(1)).zip(tables.iter().cycle());
        planes.flat_map(|(plane, values)| plane.iter().map(|x| values[usize::from(*x)])).collect()
    }

    /// The elements as f32, each frame of a still `temporal` times.
    pub(crate) fn floats(&self, temporal: usize) -> Result<Vec<f32>, KernelError> {
        let stored: Vec<f32> = match self.dtype {
            DType::F32 => self.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            DType::BF16 => {
                self.bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
            DType::U8 => self.normalised(),
            other => return Err(KernelError::Dtype { op: "patches", dtype: format!("{other:?}") }),
        };
        if self.slots == temporal {
            return Ok(stored);
        }
        Ok(stored
            .chunks(self.area.max(1))
            .flat_map(|frame| std::iter::repeat_n(frame, temporal).flatten())
            .copied()
            .collect())
    }
}
