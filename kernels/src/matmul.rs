//! The matrix product behind every linear layer: dot products of rows, f32 sums.
//!
//! Each output element sums its products in sixteen lanes over the depth in order, then by a fixed tree; the tile it is computed
//! in changes nothing. So results do not depend on the number of rows, on how columns are split, or on threads.

use crate::element::Element;
use crate::host::Host;
use crate::simd::{self, Kernel, LANES, Lanes, Vectors};
use crate::threads::SharedMut;

/// Bytes of input rows that one pass over the weights keeps in the second-level cache.
const PANEL_BYTES: usize = 384 * 1024;

/// Multiply-adds below which a second thread costs more than it brings.
const PARALLEL_WORK: usize = 1 << 16;

/// out = round(x W^T + bias).
pub(crate) struct Product<'a, E, O> {
    /// Input, `depth` elements to a row.
    pub(crate) x: &'a [E],
    /// Weight, `depth` elements to a row, one row for each output column.
    pub(crate) w: &'a [E],
    pub(crate) depth: usize,
    /// Added in f32 before the one rounding.
    pub(crate) bias: Option<&'a [E]>,
    /// Rows x columns, row-major.
    pub(crate) out: &'a mut [O],
}

/// Computes `product` on all threads.
pub(crate) fn matmul<E: Vectors, O: Element>(host: &Host, product: Product<'_, E, O>) {
    let Product { x, w, depth, bias, out } = product;
    if out.is_empty() {
        return;
    }
    if depth == 0 {
        let columns = bias.map_or(out.len(), <[E]>::len);
        for row in out.chunks_mut(columns) {
            for (i, out) in row.iter_mut().enumerate() {
                *out = O::narrow(bias.map_or(0.0, |bias| bias[i].widen()));
            }
        }
        return;
    }
    let (rows, columns) = (x.len() / depth, w.len() / depth);
    assert!(out.len() == rows * columns && bias.is_none_or(|bias| bias.len() == columns));
    let tile = 6;
    let pieces = if rows * columns * depth < PARALLEL_WORK { 1 } else { host.threads.count() * 4 };
    let piece = columns.div_ceil(pieces).next_multiple_of(tile);
    let out = SharedMut(out.as_mut_ptr());
    host.threads.run(columns.div_ceil(piece), &|index| {
        let from = index * piece;
        let to = columns.min(from + piece);
        simd::run(host.isa, Columns { x, w, depth, rows, columns, bias, out: &out, from, to });
    });
}

/// One thread's share: output columns `from..to` of all rows.
struct Columns<'a, E, O> {
    x: &'a [E],
    w: &'a [E],
    depth: usize,
    rows: usize,
    columns: usize,
    bias: Option<&'a [E]>,
    out: &'a SharedMut<O>,
    from: usize,
    to: usize,
}

impl<E: Vectors, O: Element> Kernel<E> for Columns<'_, E, O> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        let panel = (PANEL_BYTES / (self.depth * size_of::<E>())).max(4).next_multiple_of(4);
        let mut row = 0;
        while row < self.rows {
            let end = self.rows.min(row + panel);
            let mut column = self.from;
            // SAFETY: same contract; rows and columns stay below their ends.
            unsafe {
                if L::WIDE {
                    while column + 6 <= self.to {
                        self.rows_by::<L, 4, 6>(row, end, column);
                        column += 6;
                    }
                }
                while column + 2 <= self.to {
                    if L::WIDE {
                        self.rows_by::<L, 4, 2>(row, end, column);
                    } else {
                        self.rows_by::<L, 2, 2>(row, end, column);
                    }
                    column += 2;
                }
                if column < self.to {
                    self.rows_by::<L, 2, 1>(row, end, column);
                }
            }
            row = end;
        }
    }
}

impl<E: Vectors, O: Element> Columns<'_, E, O> {
    /// Rows `row..end` against `N` columns from `column`, `M` rows at a time.
    ///
    /// # Safety
    /// Rows and columns exist; the processor has the instruction set of `L`.
    #[inline(always)]
    unsafe fn rows_by<L: Lanes<Element = E>, const M: usize, const N: usize>(
        &self,
        row: usize,
        end: usize,
        column: usize,
    ) {
        let mut row = row;
        // SAFETY: same contract.
        unsafe {
            while row + M <= end {
                self.tile::<L, M, N>(row, column);
                row += M;
            }
            while row + 2 <= end {
                self.tile::<L, 2, N>(row, column);
                row += 2;
            }
            if row < end {
                self.tile::<L, 1, N>(row, column);
            }
        }
    }

    /// `M` x `N` outputs at (`row`, `column`).
    ///
    /// # Safety
    /// As [`Self::rows_by`].
    #[inline(always)]
    unsafe fn tile<L: Lanes<Element = E>, const M: usize, const N: usize>(&self, row: usize, column: usize) {
        let step = LANES * E::PER_WORD;
        // SAFETY: M rows of x and N rows of w are inside their slices, each `depth` long.
        unsafe {
            let x = self.x.as_ptr().add(row * self.depth);
            let w = self.w.as_ptr().add(column * self.depth);
            let mut sums = [[L::zero(); M]; N];
            let mut k = 0;
            while k + step <= self.depth {
                let mut inputs = [L::splat(0); M];
                for (m, input) in inputs.iter_mut().enumerate() {
                    *input = L::load(x.add(m * self.depth + k).cast());
                }
                for (n, sums) in sums.iter_mut().enumerate() {
                    let weight = L::load(w.add(n * self.depth + k).cast());
                    for (sum, input) in sums.iter_mut().zip(inputs) {
                        *sum = L::step(*sum, input, weight);
                    }
                }
                k += step;
            }
            if k < self.depth {
                let rest = self.depth - k;
                for (n, sums) in sums.iter_mut().enumerate() {
                    let weight = L::load_some(w.add(n * self.depth + k), rest);
                    for (m, sum) in sums.iter_mut().enumerate() {
                        *sum = L::step(*sum, L::load_some(x.add(m * self.depth + k), rest), weight);
                    }
                }
            }
            let out = self.out.get().add(row * self.columns + column);
            for (n, sums) in sums.iter().enumerate() {
                let bias = self.bias.map_or(0.0, |bias| bias[column + n].widen());
                if M == 4 {
                    let totals = L::total4([sums[0], sums[1 % M], sums[2 % M], sums[3 % M]]);
                    for (m, total) in totals.into_iter().enumerate() {
                        out.add(m * self.columns + n).write(O::narrow(total + bias));
                    }
                } else {
                    for (m, &sum) in sums.iter().enumerate() {
                        out.add(m * self.columns + n).write(O::narrow(L::total(sum) + bias));
                    }
                }
            }
        }
    }
}
