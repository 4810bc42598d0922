//! Rotation angles on the CPU: cos and sin of (position x frequency), rounded where transformers rounds (models.md section 0).

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::KernelError;
use crate::view::shape_error;

/// cos and sin of `position * frequency`: the product in f32, as transformers has it, both functions of it in f64, rounded to f32.
pub fn angle(position: u32, frequency: f32) -> (f32, f32) {
    let angle = f64::from(position as f32 * frequency);
    (angle.cos() as f32, angle.sin() as f32)
}

/// Rows of a table at first, doubled as often as needed: most steps see positions that an earlier one saw.
const FIRST_ROWS: usize = 128;

/// Frequencies of a rotation, the axis of a position that each turns with, and the cached table of their cos and sin.
#[derive(Debug, Clone)]
pub struct CpuFrequencies {
    inverse: Vec<f32>,
    axes: Vec<u32>,
    table: Arc<Mutex<Table>>,
}

/// cos and sin of every frequency at the positions `0..rows`, `[rows, frequencies]` each.
#[derive(Debug, Default)]
struct Table {
    cos: Vec<f32>,
    sin: Vec<f32>,
    rows: usize,
}

impl Table {
    fn grow(&mut self, inverse: &[f32], rows: usize) {
        if rows <= self.rows {
            return;
        }
        let rows = rows.next_power_of_two().max(FIRST_ROWS);
        for position in self.rows..rows {
            for &frequency in inverse {
                let (cos, sin) = angle(position as u32, frequency);
                self.cos.push(cos);
                self.sin.push(sin);
            }
        }
        self.rows = rows;
    }
}

impl CpuFrequencies {
    pub(crate) fn new(inverse: &[f32], axes: &[u32]) -> Result<Self, KernelError> {
        check("frequencies", inverse, axes)?;
        Ok(Self { inverse: inverse.to_vec(), axes: axes.to_vec(), table: Arc::default() })
    }

    /// Number of frequencies.
    pub(crate) fn len(&self) -> usize {
        self.inverse.len()
    }

    /// cos and sin at `positions [T * 3]`, `[T, frequencies]` each, from the table.
    pub(crate) fn angles(&self, positions: &[u32]) -> Result<(Vec<f32>, Vec<f32>), KernelError> {
        if !positions.len().is_multiple_of(3) {
            return Err(shape_error("rope_table", format!("{} positions are not rows of three", positions.len())));
        }
        // Nothing under the lock panics.
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let highest = positions.iter().max().map_or(0, |highest| *highest as usize + 1);
        table.grow(&self.inverse, highest);
        let rows = positions.as_chunks::<3>().0.iter();
        let angles = |row: &[u32; 3]| {
            let (row, table, width) = (*row, &*table, self.len());
            self.axes.iter().enumerate().map(move |(number, axis)| {
                let at = row[*axis as usize] as usize * width + number;
                (table.cos[at], table.sin[at])
            })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_computed_once() {
        let frequencies = CpuFrequencies::new(&[1.0, 0.5, 0.25, 0.125], &[0, 1, 2, 0]).unwrap();
        frequencies.angles(&[2, 2, 2]).unwrap();
        // A mark in the table comes back, also when it has grown in between.
        frequencies.table.lock().unwrap().cos[2 * 4] = 42.0;
        for last in [2, 100, 1000, 2] {
            let (cos, sin) = frequencies.angles(&[2, 2, 2, last, 7, 9]).unwrap();
            assert_eq!(cos[0], 42.0);
            assert_eq!((cos[5], sin[6]), (angle(7, 0.5).0, angle(9, 0.25).1), "each axis has its own row");
        }
        assert_eq!(frequencies.table.lock().unwrap().rows, 1024);
    }
}
