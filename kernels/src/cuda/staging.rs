//! Where a step's host inputs lie on the device: one buffer of 32-bit words, filled by one copy.

use std::sync::Arc;

use super::CudaBackend;
use super::tensor::{CudaBatch, CudaIndices};
use crate::error::KernelError;
use crate::step::{Staged, StepInputs};
use crate::view::shape_error;

/// Parts start at 16-byte boundaries.
const ALIGN: usize = 4;

/// Sizes of a step as staged: a recorded step is padded up to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub rows: usize,
    pub sequences: usize,
    pub logit_rows: usize,
    /// Sequences of [`StepInputs::tail`], whose extents are staged a second time; 0 if there is none.
    pub tail: usize,
    /// Entries of one row of the block table.
    pub stride: usize,
}

/// Offsets of the parts, in words.
#[derive(Debug, Clone, Copy)]
struct Parts {
    ids: usize,
    positions: usize,
    slots: usize,
    logit_rows: usize,
    query_start: usize,
    context: usize,
    width: usize,
    table: usize,
    tail_query_start: usize,
    tail_context: usize,
    tail_table: usize,
    end: usize,
}

impl Sizes {
    /// Exactly those of `inputs`.
    pub fn of(inputs: &StepInputs) -> Self {
        let ragged = &inputs.ragged;
        let needed = ragged.context.iter().map(|tokens| (*tokens as usize).div_ceil(inputs.block_tokens.max(1)));
        Self {
            rows: inputs.ids.len(),
            sequences: ragged.context.len(),
            logit_rows: inputs.logit_rows.len(),
            tail: inputs.tail().map_or(0, |tail| tail.len()),
            stride: needed.max().unwrap_or(0).max(1),
        }
    }

    fn parts(&self) -> Parts {
        let mut end = 0;
        let mut part = |words: usize| {
            let start = end;
            end = (end + words).next_multiple_of(ALIGN);
            start
        };
        let ids = part(self.rows);
        let positions = part(3 * self.rows);
        let slots = part(self.rows);
        let logit_rows = part(self.logit_rows);
        let query_start = part(self.sequences + 1);
        let context = part(self.sequences);
        // What stands before the table, and where it begins, does not depend on its width.
        let width = part(1);
        let table = part(self.sequences * self.stride);
        let tail_query_start = part(self.tail + 1);
        let tail_context = part(self.tail);
        let tail_table = part(self.tail * self.stride);
        Parts {
            ids,
            positions,
            slots,
            logit_rows,
            query_start,
            context,
            width,
            table,
            tail_query_start,
            tail_context,
            tail_table,
            end,
        }
    }

    /// Words of the whole buffer.
    pub fn words(&self) -> usize {
        self.parts().end
    }

    /// Writes `inputs` in their places; what is padded has id 0, position 0, no context and no slot.
    pub fn fill(&self, inputs: &StepInputs, words: &mut [u32]) -> Result<(), KernelError> {
        check(inputs)?;
        let parts = self.parts();
        if words.len() < parts.end {
            return Err(shape_error("step", format!("{} words staged, {} needed", words.len(), parts.end)));
        }
        words[..parts.end].fill(0);
        let ragged = &inputs.ragged;
        words[parts.ids..][..inputs.ids.len()].copy_from_slice(&inputs.ids);
        let positions = inputs.positions.as_flattened();
        words[parts.positions..][..positions.len()].copy_from_slice(positions);
        words[parts.slots..][..self.rows].fill(u32::MAX);
        words[parts.logit_rows..][..inputs.logit_rows.len()].copy_from_slice(&inputs.logit_rows);
        words[parts.width] = self.stride as u32;
        let mut row = 0;
        for (sequence, blocks) in ragged.blocks.iter().enumerate() {
            let context = ragged.context[sequence] as usize;
            let (start, end) = (ragged.query_start[sequence], ragged.query_start[sequence + 1]);
            words[parts.query_start + sequence + 1] = end;
            words[parts.context + sequence] = context as u32;
            let needed = context.div_ceil(inputs.block_tokens);
            words[parts.table + sequence * self.stride..][..needed].copy_from_slice(&blocks[..needed]);
            for token in context - (end - start) as usize..context {
                let (block, within) = (blocks[token / inputs.block_tokens], token % inputs.block_tokens);
                words[parts.slots + row] = block * inputs.block_tokens as u32 + within as u32;
                row += 1;
            }
        }
        let mut end = 0;
        for (number, (sequence, rows)) in inputs.tail().unwrap_or_default().into_iter().enumerate().take(self.tail) {
            end += rows;
            words[parts.tail_query_start + number + 1] = end;
            words[parts.tail_context + number] = ragged.context[sequence];
            let from = parts.table + sequence * self.stride;
            words.copy_within(from..from + self.stride, parts.tail_table + number * self.stride);
        }
        // Padded sequences have one row each.
        for sequence in ragged.context.len()..self.sequences {
            words[parts.query_start + sequence + 1] = words[parts.query_start + sequence] + 1;
        }
        for (n, word) in
            words[parts.logit_rows..][..self.logit_rows].iter_mut().enumerate().skip(inputs.logit_rows.len())
        {
            *word = n as u32;
        }
        Ok(())
    }

    /// The parts of a buffer at `address`, filled from `inputs`.
    pub fn parts_at(&self, address: u64, inputs: &StepInputs) -> Staged<CudaBackend> {
        let parts = self.parts();
        let at = |word: usize| address + 4 * word as u64;
        let ragged = &inputs.ragged;
        let largest_block = ragged.blocks.iter().flatten().copied().max();
        let batch = |rows: usize, sequences: usize, extents: (Vec<u32>, Vec<u32>), places: [usize; 3]| {
            let [query_start, context, table] = places.map(at);
            let counts = || extents.0.windows(2).map(|pair| pair[1] - pair[0]);
            CudaBatch {
                rows,
                sequences,
                stride: self.stride,
                block_tokens: inputs.block_tokens,
                tiles: Arc::default(),
                decodes: counts().any(|rows| rows == 1),
                longest: counts().max().unwrap_or(0) as usize,
                largest_block,
                slots: at(parts.slots),
                query_start,
                context,
                width: at(parts.width),
                table,
                extents: Arc::new(extents),
            }
        };
        let extents = (ragged.query_start.clone(), ragged.context.clone());
        let whole = [parts.query_start, parts.context, parts.table];
        let tail = inputs.tail().map(|tail| {
            let own = crate::batch::part(ragged, &tail);
            let places = [parts.tail_query_start, parts.tail_context, parts.tail_table];
            batch(inputs.logit_rows.len(), tail.len(), (own.query_start, own.context), places)
        });
        let largest = |list: &[u32]| list.iter().copied().max();
        let positions = inputs.positions.as_flattened();
        Staged {
            ids: CudaIndices::borrowed(at(parts.ids), self.rows, inputs.largest_id()),
            positions: CudaIndices::borrowed(at(parts.positions), 3 * self.rows, largest(positions)),
            batch: batch(self.rows, self.sequences, extents, whole),
            logit_rows: CudaIndices::borrowed(at(parts.logit_rows), self.logit_rows, largest(&inputs.logit_rows)),
            tail,
        }
    }
}

/// Errors unless the parts of `inputs` agree with each other.
fn check(inputs: &StepInputs) -> Result<(), KernelError> {
    let wrong = |what: String| Err(shape_error("step", what));
    let (rows, block_tokens) = (inputs.ids.len(), inputs.block_tokens);
    if block_tokens == 0 || inputs.positions.len() != rows {
        return wrong(format!("{rows} ids, {} positions, blocks of {block_tokens}", inputs.positions.len()));
    }
    crate::batch::check("step", &inputs.ragged, rows, i32::MAX as usize / block_tokens, block_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::Ragged;

    #[test]
    fn a_padded_step_has_no_slots_behind_its_rows() {
        let ragged = Ragged { query_start: vec![0, 1, 3], context: vec![5, 4], blocks: vec![vec![7, 2], vec![9]] };
        let (ids, positions) = (vec![11, 12, 13], vec![[4; 3], [2; 3], [3; 3]]);
        let inputs = StepInputs { ids, positions, ragged, block_tokens: 4, logit_rows: vec![0, 2], replayable: false };
        assert_eq!(Sizes::of(&inputs), Sizes { rows: 3, sequences: 2, logit_rows: 2, tail: 2, stride: 2 });
        let sizes = Sizes { rows: 5, sequences: 4, logit_rows: 4, tail: 2, stride: 3 };
        let mut words = vec![99; sizes.words()];
        sizes.fill(&inputs, &mut words).unwrap();
        let parts = sizes.parts();
        assert_eq!(words[parts.ids..][..5], [11, 12, 13, 0, 0]);
        assert_eq!(words[parts.slots..][..5], [8, 38, 39, u32::MAX, u32::MAX]);
        assert_eq!(words[parts.query_start..][..5], [0, 1, 3, 4, 5]);
        assert_eq!(words[parts.context..][..4], [5, 4, 0, 0]);
        assert_eq!(words[parts.width], 3);
        assert_eq!(words[parts.table..][..12], [7, 2, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(words[parts.logit_rows..][..4], [0, 2, 2, 3]);
        assert_eq!(words[parts.tail_query_start..][..3], [0, 1, 2]);
        assert_eq!(words[parts.tail_context..][..2], [5, 4]);
        assert_eq!(words[parts.tail_table..][..6], [7, 2, 0, 9, 0, 0]);
    }
}
