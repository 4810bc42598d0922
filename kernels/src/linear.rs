//! y = x W^T + b: the checks; the product is in `matmul`.

use candle_core::Tensor;

use crate::error::KernelError;
use crate::host::Host;
use crate::matmul::{Product, matmul};
use crate::simd::Vectors;
use crate::view::{View, shape_error, tensor};

/// See [`crate::Backend::linear`].
pub(crate) fn linear<E: Vectors>(
    host: &Host,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor, KernelError> {
    let op = "linear";
    let (x, w) = (View::<E>::new(op, x)?, View::<E>::new(op, w)?);
    let ((rows, depth), (columns, weight_depth)) = (x.matrix()?, w.matrix()?);
    if depth != weight_depth {
        return Err(shape_error(op, format!("x {:?} with weight {:?}", x.dims(), w.dims())));
    }
    let bias = bias.map(|bias| View::<E>::new(op, bias)).transpose()?;
    if let Some(bias) = &bias {
        bias.expect_shape("bias", &[columns])?;
    }
    let bias = bias.as_ref().map(View::data).transpose()?;
    let out: Vec<E> = matmul(host, Product { x: x.data()?, w: w.data()?, rows, columns, depth, bias });
    tensor(out, &[rows, columns])
}
