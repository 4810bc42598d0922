//! Rotation angles: one table of cos and sin for each model, rows gathered for a step's positions.
//!
//! The recipe rounds where transformers rounds (models.md §0): exponent `f32(2i) / f32(dim)`, power in f64 rounded to f32,
//! reciprocal in f32, angle as an f32 product; cos and sin of that angle, rounded to f32 here and to the model's dtype on
//! upload.

use millrace_kernels::{Backend, RopeTable};

use crate::error::ExecutorError;

/// cos and sin of every position seen so far; rows are added as sequences grow.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    inverse: Vec<f32>,
    rows: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Axis (0 temporal, 1 height, 2 width) of each frequency.
    axes: Vec<usize>,
}

/// `1 / theta^(2i / dim)` for `i` in `0..dim / 2`.
pub fn inverse_frequencies(theta: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            1.0 / (theta.powf(f64::from(exponent)) as f32)
        })
        .collect()
}

/// cos and sin of `position * frequency`.
pub fn angle(position: u32, frequency: f32) -> (f32, f32) {
    let angle = f64::from(position as f32 * frequency);
    (angle.cos() as f32, angle.sin() as f32)
}

/// Axis of each of `frequencies` frequencies under interleaved MRoPE: of every three, the second turns with the height and
/// the third with the width while their sections last; all others turn with the temporal axis.
/// Source: transformers `Qwen3VLTextRotaryEmbedding.recomposition_frequencies`.
pub fn interleaved_axes(frequencies: usize, section: &[usize]) -> Vec<usize> {
    let limit = |axis: usize| section.get(axis).copied().unwrap_or(0) * 3;
    (0..frequencies).map(|i| if i % 3 > 0 && i < limit(i % 3) { i % 3 } else { 0 }).collect()
}

impl RotaryTable {
    /// An empty table for heads of `dim` elements. `section` holds the MRoPE sections of a model whose positions have three
    /// axes.
    pub fn new(theta: f64, dim: usize, section: Option<&[usize]>) -> Self {
        let inverse = inverse_frequencies(theta, dim);
        let axes = section.map_or_else(|| vec![0; inverse.len()], |axes| interleaved_axes(inverse.len(), axes));
        Self { inverse, rows: 0, cos: Vec::new(), sin: Vec::new(), axes }
    }

    /// Rows of `positions [T]` on the device: cos and sin `[T, dim / 2]`.
    ///
    /// # Errors
    /// The upload failed.
    pub fn gather<B: Backend>(
        &mut self,
        backend: &B,
        positions: &[[u32; 3]],
    ) -> Result<RopeTable<B::Tensor>, ExecutorError> {
        let frequencies = self.inverse.len();
        let last = positions.iter().flatten().copied().max().unwrap_or(0);
        self.grow_to(last as usize + 1);
        let mut cos = Vec::with_capacity(positions.len() * frequencies);
        let mut sin = Vec::with_capacity(positions.len() * frequencies);
        for position in positions {
            for (i, axis) in self.axes.iter().enumerate() {
                let at = position.get(*axis).map_or(0, |row| *row as usize) * frequencies + i;
                cos.extend(self.cos.get(at));
                sin.extend(self.sin.get(at));
            }
        }
        let shape = [positions.len(), frequencies];
        Ok(RopeTable { cos: backend.upload(&cos, &shape)?, sin: backend.upload(&sin, &shape)? })
    }

    /// Fills the table up to `rows`, doubling so that a growing sequence fills it seldom.
    fn grow_to(&mut self, rows: usize) {
        if rows <= self.rows {
            return;
        }
        let rows = rows.next_power_of_two();
        for position in self.rows..rows {
            for frequency in &self.inverse {
                let (cos, sin) = angle(position as u32, *frequency);
                self.cos.push(cos);
                self.sin.push(sin);
            }
        }
        self.rows = rows;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_interleave_as_in_qwen3_vl() {
        let axes: String =
            interleaved_axes(64, &[24, 20, 20]).iter().map(|&axis| "THW".as_bytes()[axis] as char).collect();
        assert_eq!(axes, format!("{}TTTT", "THW".repeat(20)));
        assert_eq!(interleaved_axes(8, &[4, 1, 3]), [0, 1, 2, 0, 0, 2, 0, 0]);
    }

    #[test]
    fn the_angle_is_rounded_to_f32_before_cos() {
        let frequency = inverse_frequencies(5e6, 128)[1];
        let (cos, _) = angle(200_003, frequency);
        assert_eq!(cos, f64::from(200_003f32 * frequency).cos() as f32);
        assert_ne!(cos, (200_003f64 * f64::from(frequency)).cos() as f32);
    }

    #[test]
    fn rows_are_computed_once() {
        let backend = millrace_kernels::CpuBackend::new(candle_core::DType::F32).unwrap();
        let mut table = RotaryTable::new(1e4, 8, None);
        table.gather(&backend, &[[2; 3]]).unwrap();
        // A mark in the table comes back, also when it has grown in between.
        table.cos[2 * 4] = 42.0;
        for last in [2, 100, 2] {
            let rows = table.gather(&backend, &[[2; 3], [last; 3]]).unwrap();
            assert_eq!(backend.to_host(&rows.cos).unwrap()[0], 42.0);
        }
        assert_eq!((table.rows, table.cos.len()), (128, 128 * 4));
    }

    #[test]
    fn first_frequency_is_one_radian_a_token() {
        let (cos, sin) = angle(3, inverse_frequencies(1e4, 10)[0]);
        assert_eq!((cos, sin), (3f64.cos() as f32, 3f64.sin() as f32));
        assert_eq!(inverse_frequencies(1e4, 10).len(), 5);
    }
}
