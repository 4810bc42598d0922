//! Launches of `rows.cu` and `argmax.cu`: gather, scatter, concatenation, greedy draws.

use super::CudaBackend;
use super::driver::{Argument, Launch};
use super::tensor::{CudaIndices, CudaTensor, ELEMENT};
use crate::error::KernelError;
use crate::step::StepInputs;
use crate::view::shape_error;

const THREADS: u32 = 128;

impl CudaBackend {
    pub(super) fn gather(
        &self,
        op: &'static str,
        table: &CudaTensor,
        rows: &CudaIndices,
    ) -> Result<CudaTensor, KernelError> {
        let (count, width) = table.matrix(op)?;
        rows.check(op, count)?;
        let out = self.activation(&[rows.count, width])?;
        let arguments = [table.argument(), rows.argument(), out.argument(), Argument::Int(width as i32)];
        self.driver.launch("gather_rows", Launch::rows(rows.count, THREADS), &arguments)?;
        Ok(out)
    }

    /// Rows of `table` at `ids`, some of which may stand for draws of the step before.
    pub(super) fn gather_embeddings(&self, table: &CudaTensor, ids: &CudaIndices) -> Result<CudaTensor, KernelError> {
        let op = "embed";
        let Some(drawn) = ids.drawn else { return self.gather(op, table, ids) };
        let (count, width) = table.matrix(op)?;
        ids.check(op, count.min(StepInputs::DRAWN as usize))?;
        let out = self.activation(&[ids.count, width])?;
        let (drawn, limit) = (Argument::Pointer(drawn), Argument::Int(count as i32));
        let arguments = [table.argument(), ids.argument(), drawn, out.argument(), Argument::Int(width as i32), limit];
        self.driver.launch("embed_rows", Launch::rows(ids.count, THREADS), &arguments)?;
        Ok(out)
    }

    /// A copy of `x`, changed by `kernel` at `rows`.
    pub(super) fn scatter(
        &self,
        kernel: &'static str,
        x: &CudaTensor,
        rows: &CudaIndices,
        values: &CudaTensor,
    ) -> Result<CudaTensor, KernelError> {
        let (count, width) = x.matrix(kernel)?;
        values.expect(kernel, "values", &[rows.count, width])?;
        rows.check(kernel, count)?;
        let out = self.activation(x.shape())?;
        self.copy(x.address(), out.address(), x.elements() * ELEMENT)?;
        let [width, number, distinct] =
            [width, rows.count, usize::from(rows.distinct)].map(|n| Argument::Int(n as i32));
        let arguments = [out.argument(), rows.argument(), values.argument(), width, number, distinct];
        self.driver.launch(kernel, Launch::rows(rows.count, THREADS).alone(), &arguments)?;
        Ok(out)
    }

    /// `parts` one below the other; several that lie so already are not copied.
    pub(super) fn concat(&self, parts: &[CudaTensor]) -> Result<CudaTensor, KernelError> {
        let op = "concat_rows";
        let first = parts.first().ok_or_else(|| shape_error(op, "nothing to concatenate"))?;
        let (_, width) = first.matrix(op)?;
        let mut rows = 0;
        for part in parts {
            let (count, own) = part.matrix(op)?;
            if own != width {
                return Err(shape_error(op, format!("rows of {own} below rows of {width}")));
            }
            rows += count;
        }
        if parts.len() > 1
            && let Some(joined) = CudaTensor::joined(parts, rows, width)
        {
            return Ok(joined);
        }
        let out = self.activation(&[rows, width])?;
        let mut to = out.address();
        for part in parts {
            let bytes = part.elements() * ELEMENT;
            self.copy(part.address(), to, bytes)?;
            to += bytes as u64;
        }
        Ok(out)
    }

    /// Launches the greedy draw of every row of `logits` into `winners`, u32 each.
    pub(super) fn argmax(&self, logits: &CudaTensor, winners: u64) -> Result<(), KernelError> {
        let (rows, width) = logits.matrix("winners")?;
        let arguments = [logits.argument(), Argument::Pointer(winners), Argument::Int(width as i32)];
        self.driver.launch("argmax_rows", Launch::rows(rows, 1024), &arguments)
    }
}
