//! Tensor maps: how the copy engine of Hopper (TMA) sees a matrix. Made for each launch; that costs less than a microsecond.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::driver::Argument;
use super::tensor::{CudaTensor, ELEMENT};
use crate::error::KernelError;
use crate::view::shape_error;

/// A row-major bf16 matrix in boxes of `box_rows x box_columns`, whose rows of 128 bytes lie swizzled in shared memory.
#[derive(Debug)]
pub(super) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// The map of `x` as a `rows x columns` matrix; columns a multiple of eight, its address one of sixteen.
    pub fn new(
        x: &CudaTensor,
        [rows, columns]: [usize; 2],
        [box_rows, box_columns]: [u32; 2],
    ) -> Result<Self, KernelError> {
        let op = "tensor_map";
        if x.elements() != rows * columns || !columns.is_multiple_of(8) || !x.address().is_multiple_of(16) {
            return Err(shape_error(op, format!("{:?} at {:#x} as {rows} x {columns}", x.shape(), x.address())));
        }
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, strides) = ([columns as u64, rows as u64], [(columns * ELEMENT) as u64]);
        let (boxes, steps) = ([box_columns, box_rows], [1u32; 2]);
        // SAFETY: every array has the rank's length (strides one less), and the map is written, nothing else.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                x.address() as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(super::driver::failed("cuTensorMapEncodeTiled"))?;
        Ok(Self(map))
    }

    /// The map as a kernel's argument; `self` must live until the launch returns.
    pub fn argument(&self) -> Argument {
        Argument::Value((&raw const self.0).cast())
    }
}
