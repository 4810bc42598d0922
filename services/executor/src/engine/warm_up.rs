//! Before the first request: every decode step that the device records is run once, and chunks of a few sizes, so that choosing
//! algorithms and recording cost no request anything. What this writes into the KV pool belongs to nobody.

use millrace_kernels::{Backend, Draw, Ragged, StepInputs};

use super::Engine;
use crate::error::ExecutorError;
use crate::step_batch::StepBatch;

/// Rows of the chunks.
const CHUNK_ROWS: [usize; 4] = [64, 512, 1024, 4096];

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
        let most_rows = self.limits.step_tokens.min(self.limits.model.max_tokens);
        for rows in CHUNK_ROWS.into_iter().filter(|rows| *rows <= most_rows) {
            self.dry_run(1, rows)?;
        }
        // The largest first: its slabs hold what the smaller ones need.
        for sequences in batches.into_iter().rev() {
            self.dry_run(sequences, 1)?;
        }
        Ok(())
    }

    /// One step of `sequences` times `rows` tokens, all in the pool's first block.
    fn dry_run(&mut self, sequences: usize, rows: usize) -> Result<(), ExecutorError> {
        let block_tokens = self.limits.block_tokens;
        let ragged = Ragged {
            query_start: (0..=sequences).map(|n| (n * rows) as u32).collect(),
            context: vec![rows as u32; sequences],
            blocks: vec![vec![0; rows.div_ceil(block_tokens)]; sequences],
        };
        let inputs = StepInputs {
            ids: vec![0; sequences * rows],
            positions: (0..sequences).flat_map(|_| (0..rows).map(|n| [n as u32; 3])).collect(),
            ragged,
            block_tokens,
            logit_rows: (1..=sequences).map(|n| (n * rows - 1) as u32).collect(),
            replayable: rows == 1,
        };
        let Self { backend, model, caches, .. } = self;
        let forward = &mut |staged: &_| model.forward(backend, &StepBatch { staged, vision: None }, caches);
        let logits = backend.step::<ExecutorError>(inputs, forward)?;
        let flight = backend.finish(Some((&logits, &vec![Draw::GREEDY; sequences])))?;
        backend.finished(flight)?;
        Ok(())
    }
}
