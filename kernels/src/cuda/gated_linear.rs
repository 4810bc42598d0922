//! Launch of `gated_linear_sm90.cu`: SwiGLU of a linear layer for many rows in one pass.

use super::CudaBackend;
use super::driver::{Argument, Driver, Launch};
use super::tensor::CudaTensor;
use crate::error::KernelError;

pub(super) const KERNELS: &[(&str, &[&str])] = &[("gated_linear_sm90", &[KERNEL])];

const KERNEL: &str = "gated_linear_sm90";
const SHARED_BYTES: usize = 230_528;
/// Rows of x and outputs that a block makes.
const TILE: usize = 128;
/// Rows from which it beats a linear layer and a pass behind it.
const FEWEST_ROWS: usize = 1024;

/// Whether it takes `rows x inputs x outputs` (gate and up rows) on a card of this capability.
fn fits([rows, inputs, outputs]: [usize; 3], capability: (i32, i32)) -> bool {
    let whole = outputs.is_multiple_of(2 * TILE) && inputs.is_multiple_of(8) && inputs > 0 && outputs > 0;
    capability == (9, 0) && whole && rows >= FEWEST_ROWS
}

/// Lets its blocks use the shared memory that they need, where the card has it.
pub(super) fn prepare(driver: &Driver) -> Result<(), KernelError> {
    if driver.capability == (9, 0) { driver.allow_shared(KERNEL, SHARED_BYTES) } else { Ok(()) }
}

impl CudaBackend {
    /// `out [T, I]` = SwiGLU of `x [T, K] w [2 I, K]^T`; false if there is no such kernel for these sizes.
    pub(super) fn gated_linear(
        &self,
        x: &CudaTensor,
        w: &CudaTensor,
        out: &CudaTensor,
        sizes: [usize; 3],
    ) -> Result<bool, KernelError> {
        if !fits(sizes, self.driver.capability) || SHARED_BYTES > self.driver.shared_bytes {
            return Ok(false);
        }
        let [rows, inputs, outputs] = sizes;
        let [m, n, k] = [rows, outputs / 2, inputs].map(|size| Argument::Int(size as i32));
        let arguments = [
            self.driver.matrix_map(x.address(), [rows, inputs], [TILE, 64])?,
            self.driver.matrix_map(w.address(), [outputs, inputs], [TILE, 64])?,
            self.driver.matrix_map(out.address(), [rows, outputs / 2], [64, 64])?,
            m,
            n,
            k,
        ];
        let tiles = rows.div_ceil(2 * TILE) * (outputs / (2 * TILE));
        let blocks = (2 * tiles).min(self.driver.multiprocessors & !1);
        self.driver.launch(KERNEL, Launch::rows(blocks, 384).shared(SHARED_BYTES), &arguments)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_rows_of_whole_tiles_on_hopper() {
        assert!(fits([8192, 2560, 19_456], (9, 0)) && fits([1024, 2048, 12_288], (9, 0)));
        assert!(!fits([8192, 2560, 19_456], (8, 0)) && !fits([8192, 2560, 19_456], (10, 0)));
        assert!(!fits([512, 2560, 19_456], (9, 0)));
        assert!(!fits([8192, 2560, 19_456 + 128], (9, 0)) && !fits([8192, 2564, 19_456], (9, 0)));
    }
}
