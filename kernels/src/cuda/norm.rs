//! Launches of `norm.cu` and `activation.cu`.

use super::CudaBackend;
use super::driver::{Argument, Launch};
use super::tensor::CudaTensor;
use crate::backend::GeluKind;
use crate::error::KernelError;
use crate::view::shape_error;

/// Elements of one 16-byte access (numeric.cuh).
const VECTOR: usize = 8;
/// Vectors that a thread keeps (norm.cu).
const KEPT: usize = 2;
const MOST_THREADS: usize = 1024;

/// Threads for a row of `width` elements, if the kernels that keep the row in registers take it: enough that each thread keeps
/// as few vectors as possible.
fn kept_threads(width: usize) -> Option<u32> {
    let vectors = width / VECTOR;
    let fits = width.is_multiple_of(VECTOR) && vectors <= KEPT * MOST_THREADS;
    fits.then(|| vectors.next_multiple_of(32).min(MOST_THREADS) as u32)
}

impl CudaBackend {
    pub(super) fn rms(&self, x: &CudaTensor, w: &CudaTensor, eps: f32) -> Result<CudaTensor, KernelError> {
        let op = "rms_norm";
        let (rows, width) = x.rows(op)?;
        w.expect(op, "weight", &[width])?;
        let out = self.activation(x.shape())?;
        let (size, eps) = (Argument::Int(width as i32), Argument::Float(eps));
        let none = Argument::Pointer(0);
        match kept_threads(width) {
            Some(threads) => {
                let arguments = [x.argument(), w.argument(), out.argument(), size, eps];
                self.driver.launch(op, Launch::rows(rows, threads), &arguments)?;
            }
            None => {
                let arguments = [none, x.argument(), w.argument(), none, out.argument(), size, eps];
                self.driver.launch("rms_norm_any", Launch::rows(rows, 256).alone(), &arguments)?;
            }
        }
        Ok(out)
    }

    pub(super) fn add_rms(
        &self,
        residual: &CudaTensor,
        x: &CudaTensor,
        w: &CudaTensor,
        eps: f32,
    ) -> Result<(CudaTensor, CudaTensor), KernelError> {
        let op = "rms_norm";
        let (rows, width) = x.rows(op)?;
        residual.expect(op, "residual", x.shape())?;
        w.expect(op, "weight", &[width])?;
        let (sum, out) = (self.activation(x.shape())?, self.activation(x.shape())?);
        let arguments = [
            residual.argument(),
            x.argument(),
            w.argument(),
            sum.argument(),
            out.argument(),
            Argument::Int(width as i32),
            Argument::Float(eps),
        ];
        match kept_threads(width) {
            Some(threads) => self.driver.launch("add_rms_norm", Launch::rows(rows, threads), &arguments)?,
            None => self.driver.launch("rms_norm_any", Launch::rows(rows, 256).alone(), &arguments)?,
        }
        Ok((sum, out))
    }

    pub(super) fn layer(
        &self,
        x: &CudaTensor,
        w: &CudaTensor,
        b: &CudaTensor,
        eps: f32,
    ) -> Result<CudaTensor, KernelError> {
        let op = "layer_norm";
        let (rows, width) = x.rows(op)?;
        w.expect(op, "weight", &[width])?;
        b.expect(op, "bias", &[width])?;
        let out = self.activation(x.shape())?;
        let (size, eps) = (Argument::Int(width as i32), Argument::Float(eps));
        let none = Argument::Pointer(0);
        match kept_threads(width) {
            Some(threads) => {
                let arguments = [x.argument(), w.argument(), b.argument(), out.argument(), size, eps];
                self.driver.launch(op, Launch::rows(rows, threads).alone(), &arguments)?;
            }
            None => {
                let arguments = [none, x.argument(), w.argument(), b.argument(), none, out.argument(), size, eps];
                self.driver.launch("layer_norm_any", Launch::rows(rows, 256).alone(), &arguments)?;
            }
        }
        Ok(out)
    }

    pub(super) fn add_layer(
        &self,
        residual: &CudaTensor,
        x: &CudaTensor,
        w: &CudaTensor,
        b: &CudaTensor,
        eps: f32,
    ) -> Result<(CudaTensor, CudaTensor), KernelError> {
        let op = "layer_norm";
        let (rows, width) = x.rows(op)?;
        residual.expect(op, "residual", x.shape())?;
        w.expect(op, "weight", &[width])?;
        b.expect(op, "bias", &[width])?;
        let (sum, out) = (self.activation(x.shape())?, self.activation(x.shape())?);
        let arguments = [
            residual.argument(),
            x.argument(),
            w.argument(),
            b.argument(),
            sum.argument(),
            out.argument(),
            Argument::Int(width as i32),
            Argument::Float(eps),
        ];
        let (kernel, threads) =
            kept_threads(width).map_or(("layer_norm_any", 256), |threads| ("add_layer_norm", threads));
        self.driver.launch(kernel, Launch::rows(rows, threads).alone(), &arguments)?;
        Ok((sum, out))
    }

    pub(super) fn swiglu_rows(&self, gate_up: &CudaTensor) -> Result<CudaTensor, KernelError> {
        let op = "swiglu";
        let (rows, double) = gate_up.matrix(op)?;
        if !double.is_multiple_of(2) {
            return Err(shape_error(op, format!("rows of {double} have no two halves")));
        }
        let width = double / 2;
        let out = self.activation(&[rows, width])?;
        let (count, threads) = (rows * width, 256);
        let elements = if width.is_multiple_of(VECTOR) { 2 * VECTOR } else { 1 };
        let arguments = [gate_up.argument(), out.argument(), Argument::Int(width as i32), Argument::Size(count as u64)];
        self.driver.launch(op, Launch::rows(count.div_ceil(elements * threads), threads as u32), &arguments)?;
        Ok(out)
    }

    pub(super) fn gelu_all(&self, x: &CudaTensor, kind: GeluKind) -> Result<CudaTensor, KernelError> {
        let out = self.activation(x.shape())?;
        let count = x.elements();
        let kind = Argument::Int(i32::from(kind == GeluKind::Erf));
        let arguments = [x.argument(), out.argument(), Argument::Size(count as u64), kind];
        self.driver.launch("gelu", Launch::rows(count.div_ceil(VECTOR * 256), 256).alone(), &arguments)?;
        Ok(out)
    }

    pub(super) fn sum(&self, a: &CudaTensor, b: &CudaTensor) -> Result<CudaTensor, KernelError> {
        b.expect("add", "the second summand", a.shape())?;
        let out = self.activation(a.shape())?;
        let count = a.elements();
        let arguments = [a.argument(), b.argument(), out.argument(), Argument::Size(count as u64)];
        self.driver.launch("add", Launch::rows(count.div_ceil(VECTOR * 256), 256), &arguments)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_as_few_vectors_as_it_can() {
        assert_eq!(kept_threads(2560), Some(320));
        assert_eq!(kept_threads(128), Some(32));
        assert_eq!(kept_threads(1024 * 8), Some(1024));
        assert_eq!(kept_threads(1024 * 16), Some(1024));
        assert_eq!(kept_threads(1024 * 16 + 8), None);
        assert_eq!(kept_threads(12), None);
    }
}
