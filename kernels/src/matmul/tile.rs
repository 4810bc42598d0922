//! One task of a product: some row groups against a block of columns, tile by tile.
//!
//! Where there are several row groups the depth is cut too, so that a group's rows and a tile's weights stay in the first-level
//! cache; between the cuts the sixteen lanes of every sum wait in memory, unrounded.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::pack::{Line, PackedRows};
use crate::element::Element;
use crate::simd::{Kernel, LANES, Lanes, Vectors, prefetch};
use crate::threads::SharedMut;

/// Columns of a tile, or of two where registers are few; at the right edge tiles are one column wide.
pub(super) const COLUMNS: usize = 4;

/// Steps of one cut of the depth: 2 KiB of each row.
const CUT_STEPS: usize = 32;

/// How far ahead of the weights in use the next ones are asked for, in bytes.
const AHEAD_BYTES: usize = 2048;

/// Row groups `groups` and output columns `from..to`.
pub(super) struct Task<'a, E, O> {
    pub(super) x: &'a PackedRows,
    pub(super) w: &'a [E],
    pub(super) depth: usize,
    pub(super) columns: usize,
    pub(super) bias: Option<&'a [E]>,
    pub(super) out: &'a SharedMut<MaybeUninit<O>>,
    pub(super) groups: Range<usize>,
    pub(super) from: usize,
    pub(super) to: usize,
}

impl<E: Vectors, O: Element> Kernel<E> for Task<'_, E, O> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        let width = self.to - self.from;
        let cut = if self.groups.len() > 1 { CUT_STEPS } else { self.x.steps() };
        let most = self.x.of(self.groups.start).1;
        let waiting = if cut < self.x.steps() { most * width } else { 0 };
        let mut work = Work { lanes: vec![Line::ZERO; waiting], totals: vec![0.0; most * width], width };
        for group in self.groups.clone() {
            let (row, rows, x) = self.x.of(group);
            // SAFETY: same contract; `rows` is the group's number of rows, and the buffers hold that many times `width`.
            unsafe {
                match rows {
                    6 if L::WIDE => self.group::<L, 6>(x, cut, &mut work),
                    5 if L::WIDE => self.group::<L, 5>(x, cut, &mut work),
                    4 if L::WIDE => self.group::<L, 4>(x, cut, &mut work),
                    3 if L::WIDE => self.group::<L, 3>(x, cut, &mut work),
                    2 => self.group::<L, 2>(x, cut, &mut work),
                    _ => self.group::<L, 1>(x, cut, &mut work),
                }
            }
            for (m, totals) in work.totals.chunks_exact(width).take(rows).enumerate() {
                // SAFETY: the row exists, and its columns `from..to` belong to this task.
                let out = unsafe {
                    let start = self.out.get().add((row + m) * self.columns + self.from);
                    std::slice::from_raw_parts_mut(start, width)
                };
                match self.bias {
                    Some(bias) => {
                        for ((out, total), bias) in out.iter_mut().zip(totals).zip(&bias[self.from..self.to]) {
                            out.write(O::narrow(total + bias.widen()));
                        }
                    }
                    None => {
                        for (out, &total) in out.iter_mut().zip(totals) {
                            out.write(O::narrow(total));
                        }
                    }
                }
            }
        }
    }
}

/// Buffers of one task.
struct Work {
    /// Lanes of unfinished sums, tile by tile.
    lanes: Vec<Line>,
    /// Sums of one group, `width` to a row.
    totals: Vec<f32>,
    width: usize,
}

/// Where a tile stands in the depth.
#[derive(Clone, Copy)]
struct Cut {
    /// Steps before it.
    first: usize,
    /// Steps behind it, or before it plus its own.
    end: usize,
    /// Whether the sums are complete behind it.
    last: bool,
}

impl<E: Vectors, O: Element> Task<'_, E, O> {
    /// `M` rows against all columns of the task.
    ///
    /// # Safety
    /// `x` holds `M` rows, and `work` room for as many; the processor has the instruction set of `L`.
    #[inline(always)]
    unsafe fn group<L: Lanes<Element = E>, const M: usize>(&self, x: &[Line], cut: usize, work: &mut Work) {
        let steps = self.x.steps();
        for first in (0..steps).step_by(cut) {
            let end = steps.min(first + cut);
            let cut = Cut { first, end, last: end == steps };
            let mut column = 0;
            // SAFETY: same contract; columns stay below `width`.
            unsafe {
                while column + COLUMNS <= work.width && (L::WIDE || M == 1) {
                    self.tile::<L, M, COLUMNS>(x, cut, column, work);
                    column += COLUMNS;
                }
                while column + 2 <= work.width && !L::WIDE && M > 1 {
                    self.tile::<L, M, 2>(x, cut, column, work);
                    column += 2;
                }
                while column < work.width {
                    self.tile::<L, M, 1>(x, cut, column, work);
                    column += 1;
                }
            }
        }
    }

    /// `M` x `N` sums over one cut of the depth.
    ///
    /// # Safety
    /// As [`Self::group`]; `column + N` is at most `work.width`.
    #[inline(always)]
    unsafe fn tile<L: Lanes<Element = E>, const M: usize, const N: usize>(
        &self,
        x: &[Line],
        cut: Cut,
        column: usize,
        work: &mut Work,
    ) {
        let step = LANES * E::PER_WORD;
        // SAFETY: the group has M lines for each step; N rows of w are inside their slice, each `depth` long; lanes and totals
        // hold M times `width` sums, of which a tile at `column` has its own M N.
        unsafe {
            let w = self.w.as_ptr().add((self.from + column) * self.depth);
            let mut sums = [[L::zero(); M]; N];
            if cut.first > 0 {
                let lanes = work.lanes.as_ptr().add(column * M).cast::<f32>();
                for (n, sums) in sums.iter_mut().enumerate() {
                    for (m, sum) in sums.iter_mut().enumerate() {
                        *sum = L::load_sums(lanes.add((n * M + m) * LANES));
                    }
                }
            }
            let whole = cut.end.min(self.depth / step);
            for k in cut.first..whole {
                let mut inputs = [L::splat(0); M];
                for (m, input) in inputs.iter_mut().enumerate() {
                    *input = L::load(x.as_ptr().add(k * M + m).cast());
                }
                for (n, sums) in sums.iter_mut().enumerate() {
                    let weight = w.add(n * self.depth + k * step);
                    prefetch(weight.cast::<u8>().wrapping_add(AHEAD_BYTES));
                    let weight = L::load(weight.cast());
                    for (sum, input) in sums.iter_mut().zip(inputs) {
                        *sum = L::step(*sum, input, weight);
                    }
                }
            }
            if whole < cut.end {
                let rest = self.depth - whole * step;
                for (n, sums) in sums.iter_mut().enumerate() {
                    let weight = L::load_some(w.add(n * self.depth + whole * step), rest);
                    for (m, sum) in sums.iter_mut().enumerate() {
                        *sum = L::step(*sum, L::load(x.as_ptr().add(whole * M + m).cast()), weight);
                    }
                }
            }
            if !cut.last {
                let lanes = work.lanes.as_mut_ptr().add(column * M).cast::<f32>();
                for (n, sums) in sums.iter().enumerate() {
                    for (m, &sum) in sums.iter().enumerate() {
                        L::store(sum, lanes.add((n * M + m) * LANES));
                    }
                }
                return;
            }
            let totals = work.totals.as_mut_ptr().add(column);
            for m in 0..M {
                let totals = totals.add(m * work.width);
                if N == COLUMNS {
                    let four = L::total4([sums[0][m], sums[1 % N][m], sums[2 % N][m], sums[3 % N][m]]);
                    totals.cast::<[f32; 4]>().write(four);
                } else {
                    for (n, sums) in sums.iter().enumerate() {
                        totals.add(n).write(L::total(sums[m]));
                    }
                }
            }
        }
    }
}
