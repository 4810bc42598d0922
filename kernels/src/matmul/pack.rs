//! Input rows in the order in which tiles read them: groups of rows, and in a group one vector of each row after the other.

use crate::element::Element;
use crate::host::Host;
use crate::simd::{Isa, LANES};
use crate::threads::SharedMut;

/// Elements below which one thread packs alone.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// Sixteen words on a cache line of their own.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; LANES]);

impl Line {
    pub(super) const ZERO: Self = Self([0; LANES]);
}

/// All rows of an input.
pub(super) struct PackedRows {
    /// `[group][step][row of the group]`; the end of the last step is zero.
    lines: Vec<Line>,
    rows: usize,
    /// Rows of every group but the last.
    group: usize,
    /// Vectors of one row.
    steps: usize,
}

impl PackedRows {
    /// Packs rows of `depth` elements, which is not zero.
    pub(super) fn new<E: Element>(host: &Host, threads: usize, x: &[E], depth: usize) -> Self {
        let step = LANES * E::PER_WORD;
        let (rows, steps) = (x.len() / depth, depth.div_ceil(step));
        let group = group_rows(host.isa);
        let mut lines = Vec::<Line>::with_capacity(rows * steps);
        let target = SharedMut(lines.as_mut_ptr());
        let pack = |index: usize| {
            let from = index * group;
            let here = group.min(rows - from);
            for (m, row) in x[from * depth..(from + here) * depth].chunks_exact(depth).enumerate() {
                for (s, elements) in row.chunks(step).enumerate() {
                    let line = from * steps + s * here + m;
                    // SAFETY: a group's lines are written by the one task that has the group; `line` is below `rows * steps`;
                    // a chunk of at most `step` elements fits one line.
                    unsafe {
                        let line = target.get().add(line);
                        if elements.len() < step {
                            line.write(Line::ZERO);
                        }
                        std::ptr::copy_nonoverlapping(elements.as_ptr(), line.cast::<E>(), elements.len());
                    }
                }
            }
        };
        let groups = rows.div_ceil(group);
        if threads == 1 || x.len() < PARALLEL_ELEMENTS {
            (0..groups).for_each(pack);
        } else {
            host.threads.run(groups, &pack);
        }
        // SAFETY: there is room for this many, and every line of every row was written.
        unsafe { lines.set_len(rows * steps) };
        Self { lines, rows, group, steps }
    }

    /// Number of groups.
    pub(super) fn groups(&self) -> usize {
        self.rows.div_ceil(self.group)
    }

    /// Vectors of one row.
    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    /// First row, number of rows and lines of a group.
    pub(super) fn of(&self, group: usize) -> (usize, usize, &[Line]) {
        let from = group * self.group;
        let rows = self.group.min(self.rows - from);
        (from, rows, &self.lines[from * self.steps..][..rows * self.steps])
    }
}

/// Rows that share one pass over a column's weights: as many as the registers of the instruction set hold sums for.
pub(super) fn group_rows(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 if isa.available() => 6,
        _ => 2,
    }
}
