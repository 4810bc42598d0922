//! Linears of few rows by our own kernels: which one takes a problem, and its launch.
//!
//! On Hopper the copy engine streams the weights (skinny_linear_sm90.cu); elsewhere every thread streams its own (skinny_linear.cu).

use super::ahead::Ahead;
use super::driver::{Argument, Driver, Launch};
use super::tensor::{CudaTensor, ELEMENT};
use crate::error::KernelError;

/// Kernels of the two files.
pub(super) const KERNELS: &[(&str, &[&str])] = &[("skinny_linear", &OWN), ("skinny_linear_sm90", &STREAMED)];

/// By blocks of 16 weight rows in a tile and batches of 8 rows of x; the gated ones last.
const OWN: [&str; 6] = [
    "skinny_linear_r1_b1",
    "skinny_linear_r1_b2",
    "skinny_linear_r2_b1",
    "skinny_linear_r2_b2",
    "skinny_swiglu_b1",
    "skinny_swiglu_b2",
];
/// By batches of 8 rows of x; the gated ones last.
const STREAMED: [&str; 4] = ["stream_linear_c8", "stream_linear_c16", "stream_swiglu_c8", "stream_swiglu_c16"];
/// Rows that they take at most.
const MOST_ROWS: usize = 16;
/// Blocks that share a multiprocessor.
const RESIDENT: usize = 2;
/// Elsewhere: rows up to which they are faster than cuBLASLt whatever the weight, and elements of a weight up to which they are with more.
const OWN_ALWAYS: usize = 8;
const SMALL_WEIGHT: usize = 11 << 20;
/// Inputs of one step of skinny_linear_sm90.cu, weight rows of its boxes, and blocks that share a tile at most.
const SPAN: usize = 64;
const BOX_ROWS: usize = 64;
const MOST_CLUSTER: usize = 8;
/// Steps of a block at most where there are many tiles: 160 KB of weights, or 320 KB of gate and up.
const MOST_STEPS: usize = 20;

/// A launch: kernel, blocks, threads and dynamic shared memory of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Skinny {
    kernel: &'static str,
    blocks: usize,
    threads: u32,
    shared: usize,
    /// Of a kernel that takes tensor maps: blocks that share a tile, and rows of x in a box.
    streamed: Option<Streamed>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Streamed {
    cluster: usize,
    columns: usize,
}

/// The launch for `rows x inputs x outputs`, if a kernel takes it. `gated`: outputs are gate and up rows.
fn choose(sizes: [usize; 3], gated: bool, multiprocessors: usize, capability: (i32, i32)) -> Option<Skinny> {
    let [rows, inputs, outputs] = sizes;
    if rows == 0 || rows > MOST_ROWS || !inputs.is_multiple_of(8) || (gated && !outputs.is_multiple_of(2)) {
        return None;
    }
    if capability == (9, 0) {
        return Some(streamed(sizes, gated, multiprocessors));
    }
    (rows <= OWN_ALWAYS || inputs * outputs <= SMALL_WEIGHT).then(|| own(sizes, gated, multiprocessors))
}

fn own([rows, _, outputs]: [usize; 3], gated: bool, multiprocessors: usize) -> Skinny {
    let batches = rows.div_ceil(8);
    let resident = RESIDENT * multiprocessors;
    // Wider tiles read x half as often; narrower ones keep every block busy where outputs are few.
    let blocks_of_rows = if gated || outputs >= 32 * 2 * resident { 2 } else { 1 };
    let kernel = OWN[if gated { 4 } else { 2 * (blocks_of_rows - 1) } + batches - 1];
    let blocks = outputs.div_ceil(16 * blocks_of_rows).min(resident);
    Skinny { kernel, blocks, threads: 256, shared: 98_304 + 8_192 * (blocks_of_rows * batches).min(2), streamed: None }
}

fn streamed([rows, inputs, outputs]: [usize; 3], gated: bool, multiprocessors: usize) -> Skinny {
    let batches = rows.div_ceil(8);
    let kernel = STREAMED[if gated { 2 } else { 0 } + batches - 1];
    let tiles = if gated { outputs / 2 } else { outputs }.div_ceil(BOX_ROWS);
    // Few tiles are split until nearly every multiprocessor has a block; many until a block's weights are two or three of its rings,
    // so that the next kernel's blocks follow soon (found by search, H200, 2026-11-26). Only the weight's shape counts: a row's result
    // must not depend on how many rows there are.
    let (spans, enough) = (inputs.div_ceil(SPAN), multiprocessors - multiprocessors / 16);
    let wanted = |cluster| tiles * cluster < enough || (tiles > enough && spans > MOST_STEPS * cluster);
    let mut cluster = 1;
    while cluster < MOST_CLUSTER && spans >= 8 * cluster && wanted(cluster) {
        cluster *= 2;
    }
    let streamed = Some(Streamed { cluster, columns: 8 * batches });
    Skinny { kernel, blocks: tiles * cluster, threads: 128, shared: (110 << 10) + 128, streamed }
}

/// Lets the kernels use the shared memory that they need.
pub(super) fn prepare(driver: &Driver) -> Result<(), KernelError> {
    KERNELS
        .iter()
        .flat_map(|(_, names)| names.iter())
        .try_for_each(|kernel| driver.allow_shared(kernel, driver.shared_bytes))
}

/// `out [T, N] = x [T, K] w [N, K]^T (+ bias [N])`, or with `gated` its SwiGLU `[T, N / 2]`, in one launch. False if no kernel takes
/// these sizes; they are not empty, and the caller checked the shapes.
pub(super) fn run(
    driver: &Driver,
    ahead: &Ahead,
    [x, w, out]: [&CudaTensor; 3],
    bias: Option<&CudaTensor>,
    sizes: [usize; 3],
    gated: bool,
) -> Result<bool, KernelError> {
    let launch = choose(sizes, gated, driver.multiprocessors, driver.capability);
    let Some(launch) = launch.filter(|launch| launch.shared <= driver.shared_bytes) else { return Ok(false) };
    let [rows, inputs, outputs] = sizes;
    let bias = Argument::Pointer(bias.map_or(0, CudaTensor::address));
    let shape = Launch::rows(launch.blocks, launch.threads).shared(launch.shared);
    let ints = sizes.map(|size| Argument::Int(size as i32));
    let problem = |x, w| [x, w, bias, out.argument(), ints[0], ints[2], ints[1]];
    let Some(Streamed { cluster, columns }) = launch.streamed else {
        driver.launch(launch.kernel, shape, &problem(x.argument(), w.argument()))?;
        return Ok(true);
    };
    let x = driver.matrix_map(x.address(), [rows, inputs], [columns, SPAN])?;
    let map = driver.matrix_map(w.address(), [outputs, inputs], [BOX_ROWS, SPAN])?;
    let (from, bytes) = ahead.behind((w.address(), inputs * outputs * ELEMENT));
    let next = [Argument::Pointer(from), Argument::Int(bytes as i32)];
    driver.launch(launch.kernel, shape.cluster(cluster), &[&problem(x, map)[..], &next].concat())?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(sizes: [usize; 3], gated: bool, capability: (i32, i32)) -> Option<(&'static str, usize, usize)> {
        let launch = choose(sizes, gated, 132, capability)?;
        Some((launch.kernel, launch.blocks, launch.streamed.map_or(0, |streamed| streamed.cluster)))
    }

    #[test]
    fn few_rows_take_our_kernels() {
        for capability in [(8, 0), (9, 0)] {
            let kernel = |sizes, gated| kernel(sizes, gated, capability);
            assert_eq!(kernel([0, 2560, 6144], false), None);
            assert_eq!(kernel([17, 2560, 6144], false), None);
            assert_eq!(kernel([1, 2561, 6144], false), None);
            assert_eq!(kernel([1, 2560, 6145], true), None);
        }
        let kernel = |sizes, gated| kernel(sizes, gated, (8, 0));
        assert_eq!(kernel([1, 2560, 6144], false), Some(("skinny_linear_r1_b1", 264, 0)));
        assert_eq!(kernel([8, 2560, 151_936], false), Some(("skinny_linear_r2_b1", 264, 0)));
        assert_eq!(kernel([4, 2560, 19_456], true), Some(("skinny_swiglu_b1", 264, 0)));
        assert_eq!(kernel([9, 4096, 2560], false), Some(("skinny_linear_r1_b2", 160, 0)));
        assert_eq!(kernel([12, 1024, 2048], true), Some(("skinny_swiglu_b2", 64, 0)));
        assert_eq!(kernel([9, 2560, 19_456], false), None);
    }

    #[test]
    fn hopper_streams_by_the_copy_engine_and_splits_inputs_whatever_the_rows() {
        let kernel = |sizes, gated| kernel(sizes, gated, (9, 0));
        for (rows, batch) in [(1, 0), (8, 0), (9, 1), (16, 1)] {
            let (plain, gated) = (STREAMED[batch], STREAMED[2 + batch]);
            assert_eq!(kernel([rows, 2560, 6144], false), Some((plain, 192, 2)));
            assert_eq!(kernel([rows, 4096, 2560], false), Some((plain, 160, 4)));
            assert_eq!(kernel([rows, 2560, 19_456], true), Some((gated, 304, 2)));
            assert_eq!(kernel([rows, 9728, 2560], false), Some((plain, 160, 4)));
            assert_eq!(kernel([rows, 2560, 151_936], false), Some((plain, 4748, 2)));
            assert_eq!(kernel([rows, 2048, 4096], false), Some((plain, 128, 2)));
            assert_eq!(kernel([rows, 2048, 12_288], true), Some((gated, 192, 2)));
            assert_eq!(kernel([rows, 6144, 2048], false), Some((plain, 128, 4)));
            assert_eq!(kernel([rows, 8, 2], true), Some((gated, 1, 1)));
        }
    }
}
