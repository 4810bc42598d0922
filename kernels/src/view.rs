//! Typed reading of candle CPU tensors, and making new ones.
//!
//! Owns the checks that come before every op: on the CPU, of the backend's type, contiguous.

use std::marker::PhantomData;

use candle_core::{Device, Storage, StorageRef, Tensor, WithDType};

use crate::element::Element;
use crate::error::KernelError;

/// A contiguous CPU tensor's elements, held while an op reads them.
pub struct View<'a, E> {
    op: &'static str,
    storage: StorageRef<'a>,
    offset: usize,
    dims: &'a [usize],
    element: PhantomData<E>,
}

impl<'a, E: Element> View<'a, E> {
    /// Opens `tensor` for `op`.
    pub fn new(op: &'static str, tensor: &'a Tensor) -> Result<Self, KernelError> {
        let (storage, layout) = tensor.storage_and_layout();
        if storage.dtype() != E::DTYPE {
            return Err(KernelError::Dtype { op, dtype: format!("{:?}", storage.dtype()) });
        }
        if !layout.is_contiguous() {
            return Err(KernelError::Shape { op, what: format!("{:?} is not contiguous", layout.dims()) });
        }
        Ok(Self { op, storage, offset: layout.start_offset(), dims: layout.dims(), element: PhantomData })
    }

    /// The elements, row-major.
    pub fn data(&self) -> Result<&[E], KernelError> {
        match &*self.storage {
            Storage::Cpu(cpu) => {
                let count = self.dims.iter().product::<usize>();
                Ok(&cpu.as_slice::<E>()?[self.offset..self.offset + count])
            }
            _ => Err(KernelError::Shape { op: self.op, what: "tensor is not on the CPU".into() }),
        }
    }

    /// Sizes of all dimensions.
    pub fn dims(&self) -> &'a [usize] {
        self.dims
    }

    /// Rows and row length of a matrix.
    pub fn matrix(&self) -> Result<(usize, usize), KernelError> {
        match self.dims {
            &[rows, columns] => Ok((rows, columns)),
            other => Err(shape_error(self.op, format!("expected a matrix, got {other:?}"))),
        }
    }

    /// Errors unless the tensor has exactly this shape.
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<(), KernelError> {
        if self.dims == shape {
            return Ok(());
        }
        Err(shape_error(self.op, format!("{name} has shape {:?}, expected {shape:?}", self.dims)))
    }
}

/// A new CPU tensor over `values`.
pub fn tensor<E: Element>(values: Vec<E>, shape: &[usize]) -> Result<Tensor, KernelError> {
    tensor_of(values, shape)
}

/// A new CPU tensor over `values` of a type that no op computes with.
pub fn tensor_of<T: WithDType>(values: Vec<T>, shape: &[usize]) -> Result<Tensor, KernelError> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A [`KernelError::Shape`].
pub fn shape_error(op: &'static str, what: impl Into<String>) -> KernelError {
    KernelError::Shape { op, what: what.into() }
}

/// Errors with the first index that is not below `limit`.
pub fn check_indices(op: &'static str, indices: &[u32], limit: usize) -> Result<(), KernelError> {
    match indices.iter().find(|&&index| index as usize >= limit) {
        Some(&index) => Err(KernelError::Index { op, index: u64::from(index), limit: limit as u64 }),
        None => Ok(()),
    }
}
