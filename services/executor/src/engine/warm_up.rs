//! Before the first request: the largest step, chunks of a few sizes, and every decode step that the device records are run once,
//! so that making room, choosing algorithms and recording cost no request anything. What this writes into the KV pool belongs to
//! nobody.

use millrace_kernels::{Backend, Draw, StepInputs};

use super::Engine;
use super::checks::Limits;
use crate::error::ExecutorError;
use crate::step_batch::StepBatch;

/// Rows of the chunks.
const CHUNK_ROWS: [usize; 4] = [64, 512, 1024, 4096];

/// A sequence's share of a step: its rows, and its tokens up to the last of them.
#[derive(Debug, Clone, Copy)]
struct Extent {
    rows: usize,
    context: usize,
}

impl<B: Backend> Engine<B> {
    /// Runs them; nothing on a device that records nothing.
    ///
    /// # Errors
    /// The model cannot run on this device.
    pub(super) fn warm_up(&mut self) -> Result<(), ExecutorError> {
        let batches = self.backend.recorded_batches(self.spec.slots as usize);
        if batches.is_empty() {
            return Ok(());
        }
        // The largest first: what all steps share gets the size that it keeps, and recordings hold its addresses.
        self.dry_run(&self.largest_step())?;
        let most_rows = self.limits.step_tokens.min(self.limits.model.max_tokens);
        for rows in CHUNK_ROWS.into_iter().filter(|rows| *rows <= most_rows) {
            self.dry_run(&[Extent { rows, context: rows }])?;
        }
        // The largest first again: its slabs hold what the smaller ones need.
        for sequences in batches.into_iter().rev() {
            self.dry_run(&vec![Extent { rows: 1, context: 1 }; sequences])?;
        }
        Ok(())
    }

    /// As many rows as a step may have, of as many sequences, and the block table as wide as that of any job.
    fn largest_step(&self) -> Vec<Extent> {
        let Limits { blocks, block_tokens, step_tokens, ref model } = self.limits;
        let sequences = step_tokens.min(self.spec.slots as usize).max(1);
        let rows = (step_tokens + 1 - sequences).min(model.max_tokens);
        let mut extents = vec![Extent { rows: 1, context: 1 }; sequences];
        extents[0] = Extent { rows, context: rows };
        // One row, if there are others: many rows over all of a long context would take seconds.
        let longest = (blocks as usize * block_tokens).min(model.max_tokens);
        extents[sequences - 1].context = longest.max(extents[sequences - 1].rows);
        extents
    }

    /// One step of sequences that all lie in the pool's first block.
    fn dry_run(&mut self, extents: &[Extent]) -> Result<(), ExecutorError> {
        let block_tokens = self.limits.block_tokens;
        let mut inputs = StepInputs { block_tokens, ..StepInputs::default() };
        inputs.ragged.query_start.push(0);
        for Extent { rows, context } in extents {
            inputs.positions.extend((context - rows..*context).map(|position| [position as u32; 3]));
            let end = inputs.positions.len() as u32;
            inputs.ragged.query_start.push(end);
            inputs.ragged.context.push(*context as u32);
            inputs.ragged.blocks.push(vec![0; context.div_ceil(block_tokens)]);
            inputs.logit_rows.push(end - 1);
        }
        inputs.ids = vec![0; inputs.positions.len()];
        inputs.replayable = inputs.ids.len() == extents.len();
        let Self { backend, model, caches, .. } = self;
        let forward = &mut |staged: &_| model.forward(backend, &StepBatch { staged, vision: None }, caches);
        let logits = backend.step::<ExecutorError>(inputs, forward)?;
        let flight = backend.finish(Some((&logits, &vec![Draw::GREEDY; extents.len()])))?;
        backend.finished(flight)?;
        Ok(())
    }
}
