//! Ops that move whole rows: embedding, gather, scatter, concatenation.
//!
//! Owns index checks. Must not compute anything beyond the one rounding of scatter-add.

use candle_core::Tensor;

use crate::element::Element;
use crate::error::KernelError;
use crate::view::{View, check_indices, shape_error, tensor};

/// Rows of `table` at `rows`.
pub(crate) fn gather<E: Element>(op: &'static str, table: &Tensor, rows: &[u32]) -> Result<Tensor, KernelError> {
    let table = View::<E>::new(op, table)?;
    let (count, width) = table.matrix()?;
    check_indices(op, rows, count)?;
    let source = table.data()?;
    let mut out = Vec::with_capacity(rows.len() * width);
    for &row in rows {
        out.extend_from_slice(&source[row as usize * width..(row as usize + 1) * width]);
    }
    tensor(out, &[rows.len(), width])
}

/// Index of the largest value of each row, the lowest of equal ones; `None` if any value is not finite.
pub(crate) fn winners<E: Element>(logits: &Tensor) -> Result<Vec<Option<u32>>, KernelError> {
    let logits = View::<E>::new("winners", logits)?;
    let (_, width) = logits.matrix()?;
    let winner = |row: &[E]| {
        let mut best = None;
        let mut highest = f32::NEG_INFINITY;
        for (index, value) in (0u32..).zip(row) {
            let value = value.widen();
            if !value.is_finite() {
                return None;
            }
            if value > highest {
                (best, highest) = (Some(index), value);
            }
        }
        best
    };
    Ok(logits.data()?.chunks_exact(width.max(1)).map(winner).collect())
}

/// How [`scatter`] joins a value with the row it lands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Join {
    Replace,
    Add,
}

/// `x` with `values[i]` put on row `rows[i]`, in order.
pub(crate) fn scatter<E: Element>(
    op: &'static str,
    x: &Tensor,
    rows: &[u32],
    values: &Tensor,
    join: Join,
) -> Result<Tensor, KernelError> {
    let x = View::<E>::new(op, x)?;
    let values = View::<E>::new(op, values)?;
    let (count, width) = x.matrix()?;
    values.expect_shape("values", &[rows.len(), width])?;
    check_indices(op, rows, count)?;
    let mut out = x.data()?.to_vec();
    if width > 0 {
        for (&row, value) in rows.iter().zip(values.data()?.chunks_exact(width)) {
            let target = &mut out[row as usize * width..(row as usize + 1) * width];
            match join {
                Join::Replace => target.copy_from_slice(value),
                Join::Add => {
                    for (t, v) in target.iter_mut().zip(value) {
                        *t = E::narrow(t.widen() + v.widen());
                    }
                }
            }
        }
    }
    tensor(out, &[count, width])
}

/// `parts` one under the other.
pub(crate) fn concat<E: Element>(parts: &[Tensor]) -> Result<Tensor, KernelError> {
    let op = "concat_rows";
    let views = parts.iter().map(|part| View::<E>::new(op, part)).collect::<Result<Vec<_>, _>>()?;
    let Some(first) = views.first() else {
        return Err(shape_error(op, "nothing to concatenate"));
    };
    let (_, width) = first.matrix()?;
    let mut rows = 0;
    let mut out = Vec::new();
    for view in &views {
        let (count, columns) = view.matrix()?;
        if columns != width {
            return Err(shape_error(op, format!("row lengths {width} and {columns} differ")));
        }
        rows += count;
        out.extend_from_slice(view.data()?);
    }
    tensor(out, &[rows, width])
}
