//! Tensors, index lists, staged batches and block pools in device memory.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::driver::Argument;
use super::memory::{Owned, Piece};
use crate::error::KernelError;
use crate::view::shape_error;

/// Bytes of one bf16.
pub(super) const ELEMENT: usize = 2;

/// What keeps a tensor's memory.
#[derive(Debug, Clone)]
enum Storage {
    /// An allocation of its own, held only to be freed last.
    Owned(#[allow(dead_code)] Arc<Owned>),
    /// A piece of a slab, held only to be given back last.
    Piece(#[allow(dead_code)] Arc<Piece>),
    /// Memory that something longer-lived keeps.
    Borrowed,
}

impl Storage {
    /// Whether both are known to keep the same memory.
    fn shared_with(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Owned(one), Self::Owned(other)) => Arc::ptr_eq(one, other),
            (Self::Piece(one), Self::Piece(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

/// A contiguous bf16 tensor; cloning shares storage.
#[derive(Debug, Clone)]
pub struct CudaTensor {
    #[allow(dead_code)] // Held only to be given back last.
    storage: Storage,
    pointer: u64,
    shape: Vec<usize>,
}

impl CudaTensor {
    pub(super) fn owned(memory: Owned, shape: &[usize]) -> Self {
        Self { pointer: memory.pointer, storage: Storage::Owned(Arc::new(memory)), shape: shape.to_vec() }
    }

    pub(super) fn piece(piece: Piece, shape: &[usize]) -> Self {
        Self { pointer: piece.pointer, storage: Storage::Piece(Arc::new(piece)), shape: shape.to_vec() }
    }

    /// The same memory without a share in it.
    pub(super) fn borrowed(&self) -> Self {
        Self { storage: Storage::Borrowed, pointer: self.pointer, shape: self.shape.clone() }
    }

    pub(super) fn reshaped(&self, shape: &[usize]) -> Result<Self, KernelError> {
        if self.elements() != shape.iter().product::<usize>() {
            return Err(shape_error("reshape", format!("{:?} to {shape:?}", self.shape)));
        }
        Ok(Self { shape: shape.to_vec(), ..self.clone() })
    }

    /// Rows of a matrix, in the same memory.
    pub(super) fn row_range(&self, rows: Range<usize>) -> Result<Self, KernelError> {
        let op = "row_range";
        let (count, width) = self.matrix(op)?;
        if rows.start > rows.end || rows.end > count {
            return Err(shape_error(op, format!("rows {rows:?} of {count}")));
        }
        let pointer = self.pointer + (rows.start * width * ELEMENT) as u64;
        Ok(Self { storage: self.storage.clone(), pointer, shape: vec![rows.len(), width] })
    }

    /// The matrix `[rows, width]` that `parts` are, if they lie one behind the other in one piece of memory.
    pub(super) fn joined(parts: &[Self], rows: usize, width: usize) -> Option<Self> {
        let first = parts.first()?;
        let adjacent = |pair: &[Self]| {
            let [one, next] = pair else { return false };
            one.storage.shared_with(&next.storage) && one.pointer + (one.elements() * ELEMENT) as u64 == next.pointer
        };
        let all = parts.windows(2).all(adjacent);
        all.then(|| Self { shape: vec![rows, width], ..first.clone() })
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    pub(super) fn address(&self) -> u64 {
        self.pointer
    }

    pub(super) fn argument(&self) -> Argument {
        Argument::Pointer(self.pointer)
    }

    /// Rows and row length.
    pub(super) fn matrix(&self, op: &'static str) -> Result<(usize, usize), KernelError> {
        match self.shape[..] {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(shape_error(op, format!("expected a matrix, got {:?}", self.shape))),
        }
    }

    /// Rows, and the length of the last dimension.
    pub(super) fn rows(&self, op: &'static str) -> Result<(usize, usize), KernelError> {
        match self.shape.split_last() {
            Some((&width, _)) if width > 0 => Ok((self.elements() / width, width)),
            _ => Err(shape_error(op, format!("rows of nothing: {:?}", self.shape))),
        }
    }

    pub(super) fn expect(&self, op: &'static str, name: &str, shape: &[usize]) -> Result<(), KernelError> {
        if self.shape == shape {
            return Ok(());
        }
        Err(shape_error(op, format!("{name} has shape {:?}, expected {shape:?}", self.shape)))
    }
}

/// A list of u32 on the device and what the host still knows of it.
#[derive(Debug, Clone)]
pub struct CudaIndices {
    #[allow(dead_code)] // Held only to be given back last.
    storage: Storage,
    pub(super) pointer: u64,
    pub(super) count: usize,
    /// Largest entry that the host knows.
    pub(super) largest: Option<u32>,
    /// Where draws of the step before are, if entries may stand for them: u32 each.
    pub(super) drawn: Option<u64>,
    /// All entries are known to differ.
    pub(super) distinct: bool,
}

impl CudaIndices {
    /// `values` as they were copied to `piece`.
    pub(super) fn piece(piece: Piece, values: &[u32]) -> Self {
        let distinct = values.is_sorted_by(|one, next| one < next);
        let (pointer, storage) = (piece.pointer, Storage::Piece(Arc::new(piece)));
        let largest = values.iter().copied().max();
        Self { storage, pointer, count: values.len(), largest, drawn: None, distinct }
    }

    pub(super) fn borrowed(pointer: u64, count: usize, largest: Option<u32>) -> Self {
        Self { storage: Storage::Borrowed, pointer, count, largest, drawn: None, distinct: false }
    }

    /// Entries may stand for draws at `drawn`.
    pub(super) fn with_draws(self, drawn: u64) -> Self {
        Self { drawn: Some(drawn), ..self }
    }

    pub(super) fn argument(&self) -> Argument {
        Argument::Pointer(self.pointer)
    }

    /// Errors unless all entries are below `limit`.
    pub(super) fn check(&self, op: &'static str, limit: usize) -> Result<(), KernelError> {
        match self.largest {
            Some(largest) if largest as usize >= limit => {
                Err(KernelError::Index { op, index: u64::from(largest), limit: limit as u64 })
            }
            _ => Ok(()),
        }
    }
}

/// A ragged batch on the device: every pointer is into one staging buffer.
#[derive(Debug, Clone)]
pub struct CudaBatch {
    /// Query rows.
    pub(super) rows: usize,
    pub(super) sequences: usize,
    /// Entries of one row of the block table.
    pub(super) stride: usize,
    /// Tokens of one block.
    pub(super) block_tokens: usize,
    /// Query rows' prefix sums and contexts, on the host; not those of a replay.
    pub(super) extents: Arc<(Vec<u32>, Vec<u32>)>,
    /// Tiles of the first attention of this step, for the query heads of a kv head that it has.
    pub(super) tiles: Arc<OnceLock<Tiles>>,
    /// Whether some sequence has one query row.
    pub(super) decodes: bool,
    /// Most query rows of one sequence.
    pub(super) longest: usize,
    /// Largest block number used.
    pub(super) largest_block: Option<u32>,
    /// Page row of each query row, -1 for a padded one: i32 `[rows]`.
    pub(super) slots: u64,
    pub(super) query_start: u64,
    pub(super) context: u64,
    /// `stride` for kernels of recorded steps, whose replays may have another.
    pub(super) width: u64,
    pub(super) table: u64,
}

/// Tiles of a step's causal attention (tiles.rs).
#[derive(Debug)]
pub(super) struct Tiles {
    pub(super) list: Piece,
    pub(super) count: usize,
    /// Query heads of a kv head.
    pub(super) group: usize,
    /// Whether sequences of one row are left out.
    pub(super) skip_single: bool,
}

/// The table of a rotation's cos and sin, `[positions, frequencies]` each, and the axis of each frequency.
#[derive(Debug)]
pub struct CudaFrequencies {
    pub(super) cos: CudaTensor,
    pub(super) sin: CudaTensor,
    pub(super) axes: Owned,
    pub(super) positions: usize,
    pub(super) count: usize,
}

/// Angles (f32) and segments of a vision tower's run.
#[derive(Debug)]
pub struct CudaGeometry {
    pub(super) cos: Piece,
    pub(super) sin: Piece,
    pub(super) start: Piece,
    /// Tiles of rows (tiles.rs), and how many.
    pub(super) list: Piece,
    pub(super) tiles: usize,
    /// Angles in each of the two tables.
    pub(super) angles: usize,
    /// Grids: prefix sums of patches, sizes, frequencies, one behind the other in 32-bit words.
    pub(super) grids: Piece,
    /// Where in them the sizes are.
    pub(super) sizes: u64,
    /// How many grids there are, their patches, and the side of their merge blocks.
    pub(super) grid_counts: [usize; 3],
    /// Prefix sums, on the host.
    pub(super) segments: Vec<u32>,
}

/// Keys and values of one layer, `[blocks, block_tokens, kv_heads, head_dim]` each.
#[derive(Debug)]
pub struct CudaKvCache {
    pub(super) keys: Owned,
    pub(super) values: Owned,
    pub(super) blocks: usize,
    pub(super) block_tokens: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}
