//! Draws of a step's tokens: greedy ones are part of the step, random ones one launch behind it.

use super::CudaBackend;
use super::driver::{Argument, Launch};
use super::step::CudaLogits;
use crate::backend::Draw;
use crate::error::KernelError;
use crate::view::shape_error;

/// Size of `Shared` in sample.cu, rounded up.
const SHARED_BYTES: usize = 40 * 1024;

impl CudaBackend {
    /// The token of each row, `None` where a logit is not finite.
    pub(super) fn draw_rows(&self, logits: &CudaLogits, draws: &[Draw]) -> Result<Vec<Option<u32>>, KernelError> {
        let rows = logits.rows;
        if draws.len() != rows {
            return Err(shape_error("draw", format!("{} draws for {rows} rows", draws.len())));
        }
        if draws.iter().any(|draw| draw.temperature > 0.0) {
            let (_, width) = logits.logits.matrix("draw")?;
            let staged = self.staged(draws)?;
            let (winners, draws) = (Argument::Pointer(logits.winners), Argument::Pointer(staged.pointer));
            let arguments = [logits.logits.argument(), winners, draws, Argument::Int(width as i32)];
            self.driver.launch("sample_rows", Launch::rows(rows, 1024).shared(SHARED_BYTES).alone(), &arguments)?;
        }
        let drawn = self.read_words(logits.winners, rows)?;
        Ok(drawn.into_iter().map(|winner| (winner != u32::MAX).then_some(winner)).collect())
    }
}
