//! The matrix product behind every linear layer: dot products of rows, f32 sums.
//!
//! Each output element sums its products in sixteen lanes over the depth in order, then by a fixed tree; the tile it is computed
//! in changes nothing. So results do not depend on the number of rows, on how columns are split, or on threads.
//!
//! Owns the split of a product into tasks: blocks of columns whose weights stay in the second-level cache while all row groups
//! pass over them. The arithmetic of one task is in `tile`.

mod pack;
mod tile;

use std::mem::MaybeUninit;

use crate::element::Element;
use crate::host::Host;
use crate::simd::{self, Vectors};
use crate::threads::SharedMut;
use pack::PackedRows;
use tile::{COLUMNS, Task};

/// Bytes of weights that a task keeps in the second-level cache.
const BLOCK_BYTES: usize = 384 * 1024;

/// Multiply-adds below which a second thread costs more than it brings.
const PARALLEL_WORK: usize = 1 << 16;

/// Tasks for each thread, so that one slowed down by others on the machine does not hold up the rest.
const TASKS_PER_THREAD: usize = 4;

/// round(x W^T + bias).
pub(crate) struct Product<'a, E> {
    /// Input, `rows` rows of `depth` elements.
    pub(crate) x: &'a [E],
    /// Weight, `columns` rows of `depth` elements.
    pub(crate) w: &'a [E],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) depth: usize,
    /// Added in f32 before the one rounding.
    pub(crate) bias: Option<&'a [E]>,
}

/// Computes `product` on all threads: rows x columns, row-major.
pub(crate) fn matmul<E: Vectors, O: Element>(host: &Host, product: Product<'_, E>) -> Vec<O> {
    let Product { x, w, rows, columns, depth, bias } = product;
    assert!(x.len() == rows * depth && w.len() == columns * depth && bias.is_none_or(|bias| bias.len() == columns));
    if rows == 0 || columns == 0 {
        return Vec::new();
    }
    if depth == 0 {
        return (0..rows * columns).map(|i| O::narrow(bias.map_or(0.0, |bias| bias[i % columns].widen()))).collect();
    }
    let threads = if rows * columns * depth < PARALLEL_WORK { 1 } else { host.threads.count() };
    let x = PackedRows::new(host, threads, x, depth);
    let split = Split::new::<E>(threads, x.groups(), columns, depth);
    // Not zeroed first: that would be one thread's work, and touch the memory twice.
    let mut out = Vec::<O>::with_capacity(rows * columns);
    let target = SharedMut(out.as_mut_ptr().cast::<MaybeUninit<O>>());
    host.threads.run(split.tasks(), &|index| {
        let (groups, columns_here) = split.task(index, x.groups(), columns);
        let (from, to) = (columns_here.start, columns_here.end);
        simd::run(host.isa, Task { x: &x, w, depth, columns, bias, out: &target, groups, from, to });
    });
    // SAFETY: there is room for this many, and the tasks, which cover every output, wrote them all.
    unsafe { out.set_len(rows * columns) };
    out
}

/// How a product is cut into tasks: row groups by columns.
struct Split {
    /// Columns of a task, whole tiles of them.
    columns: usize,
    column_tasks: usize,
    /// Row groups of a task.
    groups: usize,
    row_tasks: usize,
}

impl Split {
    fn new<E: Element>(threads: usize, groups: usize, columns: usize, depth: usize) -> Self {
        if threads == 1 && groups == 1 {
            return Self { columns, column_tasks: 1, groups, row_tasks: 1 };
        }
        let wanted = if threads == 1 { 1 } else { threads * TASKS_PER_THREAD };
        let cached = BLOCK_BYTES / (depth * size_of::<E>());
        let piece = columns.div_ceil(wanted).min(cached).max(1).next_multiple_of(COLUMNS);
        // Rows are split only where many threads would be left with few columns each.
        let narrow = 8 * COLUMNS;
        let (piece, row_tasks) = match piece < narrow && groups > 1 {
            true => {
                (narrow.min(cached.next_multiple_of(COLUMNS)), wanted.div_ceil(columns.div_ceil(narrow)).min(groups))
            }
            false => (piece, 1),
        };
        let groups_here = groups.div_ceil(row_tasks);
        Self {
            columns: piece,
            column_tasks: columns.div_ceil(piece),
            groups: groups_here,
            row_tasks: groups.div_ceil(groups_here),
        }
    }

    fn tasks(&self) -> usize {
        self.column_tasks * self.row_tasks
    }

    /// Row groups and columns of one task.
    fn task(&self, index: usize, groups: usize, columns: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let (row, column) = (index % self.row_tasks * self.groups, index / self.row_tasks * self.columns);
        (row..groups.min(row + self.groups), column..columns.min(column + self.columns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_cover_every_output_once() {
        for (threads, groups, columns, depth) in [
            (1, 1, 7, 64),
            (1, 9, 50, 3000),
            (2, 1, 4096, 1024),
            (2, 86, 1024, 3072),
            (64, 86, 1024, 1024),
            (3, 5, 3, 9),
        ] {
            let split = Split::new::<half::bf16>(threads, groups, columns, depth);
            let mut seen = vec![0; groups * columns];
            for index in 0..split.tasks() {
                let (group_range, column_range) = split.task(index, groups, columns);
                assert!(!group_range.is_empty() && !column_range.is_empty());
                assert!(column_range.end == columns || column_range.len().is_multiple_of(COLUMNS));
                for group in group_range {
                    seen[group * columns..][column_range.clone()].iter_mut().for_each(|times| *times += 1);
                }
            }
            assert!(seen.iter().all(|&times| times == 1), "{threads} threads, {groups} groups, {columns} columns");
        }
    }
}
