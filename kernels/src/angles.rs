//! Rotation angles on the CPU: cos and sin of (position x frequency), rounded where transformers rounds (models.md section 0).

use crate::error::KernelError;
use crate::view::shape_error;

/// cos and sin of `position * frequency`: the product in f32, as transformers has it, both functions of it in f64, rounded to f32.
pub fn angle(position: u32, frequency: f32) -> (f32, f32) {
    let angle = f64::from(position as f32 * frequency);
    (angle.cos() as f32, angle.sin() as f32)
}

/// Frequencies of a rotation, and the axis of a position that each turns with.
#[derive(Debug, Clone)]
pub struct CpuFrequencies {
    inverse: Vec<f32>,
    axes: Vec<u32>,
}

impl CpuFrequencies {
    pub(crate) fn new(inverse: &[f32], axes: &[u32]) -> Result<Self, KernelError> {
        check("frequencies", inverse, axes)?;
        Ok(Self { inverse: inverse.to_vec(), axes: axes.to_vec() })
    }

    /// Number of frequencies.
    pub(crate) fn len(&self) -> usize {
        self.inverse.len()
    }

    /// cos and sin at `positions [T * 3]`, `[T, frequencies]` each.
    pub(crate) fn angles(&self, positions: &[u32]) -> Result<(Vec<f32>, Vec<f32>), KernelError> {
        if !positions.len().is_multiple_of(3) {
            return Err(shape_error("rope_table", format!("{} positions are not rows of three", positions.len())));
        }
        let rows = positions.as_chunks::<3>().0.iter();
        let angles = |row: &[u32; 3]| {
            let row = *row;
            self.inverse.iter().zip(&self.axes).map(move |(frequency, axis)| angle(row[*axis as usize], *frequency))
        };
        Ok(rows.flat_map(angles).unzip())
    }
}

/// Errors unless every frequency has one of three axes.
pub(crate) fn check(op: &'static str, inverse: &[f32], axes: &[u32]) -> Result<(), KernelError> {
    if inverse.len() != axes.len() || axes.iter().any(|axis| *axis > 2) {
        return Err(shape_error(op, format!("axes {axes:?} for {} frequencies", inverse.len())));
    }
    Ok(())
}
