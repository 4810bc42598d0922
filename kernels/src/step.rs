//! What one step takes and gives: its inputs on the host and on the device, its draws, its times.

use std::time::Duration;

use crate::backend::Backend;
use crate::error::KernelError;

/// One step's ragged batch over paged keys and values. Sequence `i` contributes the query rows
/// `query_start[i]..query_start[i + 1]`; they are the last ones of its `context[i]` tokens (causal).
#[derive(Debug, Clone, Default)]
pub struct Ragged {
    /// Prefix sums of query rows, length sequences + 1.
    pub query_start: Vec<u32>,
    /// Tokens of each sequence including this step's.
    pub context: Vec<u32>,
    /// Block table of each sequence: token t lives in block `blocks[t / block_tokens]`, row `t % block_tokens`.
    pub blocks: Vec<Vec<u32>>,
}

/// What one step takes from the host, staged on the device once ([`Backend::step`]) and read by every layer.
#[derive(Debug, Clone, Default)]
pub struct StepInputs {
    /// Token ids, one for each row, or [`StepInputs::drawn`] for a token that no host knows yet.
    pub ids: Vec<u32>,
    /// Rotary positions of each row on the axes (temporal, height, width).
    pub positions: Vec<[u32; 3]>,
    /// Extents of the sequences and their block tables.
    pub ragged: Ragged,
    /// Tokens of one block of those tables.
    pub block_tokens: usize,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<u32>,
    /// The forward pass depends on these fields alone and every sequence has one row: a device may record it for a batch size
    /// and replay it with other inputs.
    pub replayable: bool,
}

impl StepInputs {
    /// The sequences that `logit_rows` are of, and how many rows each has there: all that a last layer computes beyond keys and
    /// values. `None` if that is every row, or if a sequence's rows are not its last ones.
    pub fn tail(&self) -> Option<Vec<(usize, u32)>> {
        if self.logit_rows.len() >= self.ids.len() {
            return None;
        }
        let mut tail = Vec::new();
        let mut wanted = self.logit_rows.as_slice();
        for (sequence, extent) in self.ragged.query_start.windows(2).enumerate() {
            let (own, rest) = wanted.split_at(wanted.iter().take_while(|row| **row < extent[1]).count());
            let count = own.len() as u32;
            if count > extent[1] - extent[0] || own.iter().copied().ne(extent[1] - count..extent[1]) {
                return None;
            }
            wanted = rest;
            if count > 0 {
                tail.push((sequence, count));
            }
        }
        wanted.is_empty().then_some(tail)
    }

    /// Set in an id that stands for a draw of the step before.
    pub(crate) const DRAWN: u32 = 1 << 31;

    /// Id of the token that the step before draws for its row `row` of logits ([`Backend::finish`]): the device puts it in. Where
    /// nothing was drawn, because the row is not finite, it is token 0, whose results are of no use.
    pub fn drawn(row: u32) -> u32 {
        row | Self::DRAWN
    }

    /// Largest id that is known.
    #[cfg(feature = "cuda")]
    pub(crate) fn largest_id(&self) -> Option<u32> {
        self.ids.iter().copied().filter(|id| id & Self::DRAWN == 0).max()
    }

    /// Errors if an id stands for a draw that the step before, of `rows` draws, did not make.
    pub(crate) fn check_drawn(&self, rows: usize) -> Result<(), KernelError> {
        let beyond = |id: &u32| id & Self::DRAWN != 0 && (id & !Self::DRAWN) as usize >= rows;
        match self.ids.iter().copied().find(beyond) {
            Some(id) => Err(KernelError::Index { op: "step", index: u64::from(id & !Self::DRAWN), limit: rows as u64 }),
            None => Ok(()),
        }
    }
}

/// What became of a step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Finished {
    /// The token of each row that was drawn for, `None` for a row that is not finite.
    pub drawn: Vec<Option<u32>>,
    /// By the device's clock; `None` where the device is the host.
    pub times: Option<StepTimes>,
}

/// Times of one step on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepTimes {
    /// From the step's first work to the end of its last.
    pub busy: Duration,
    /// From the end of the step before to this one's first work; 0 for the first step.
    pub idle: Duration,
}

/// How one row's token is drawn: temperature, top-k, top-p and min-p, in this order, then by `uniform` in order of id.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Draw {
    /// In [0, 1).
    pub uniform: f64,
    /// 0 means greedy: nothing else counts then.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 0 keeps all.
    pub top_k: i32,
}

impl Draw {
    /// The likeliest token.
    pub const GREEDY: Self = Self { uniform: 0.0, temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0 };
}

/// [`StepInputs`] on a device.
#[derive(Debug)]
pub struct Staged<B: Backend> {
    /// Token ids `[T]`.
    pub ids: B::Indices,
    /// Positions `[T * 3]`.
    pub positions: B::Indices,
    /// Extents and block tables.
    pub batch: B::Batch,
    /// Rows whose logits are wanted.
    pub logit_rows: B::Indices,
    /// The batch that those rows are by themselves ([`StepInputs::tail`]); `None` where the whole batch has to be computed.
    pub tail: Option<B::Batch>,
}

/// A model's forward pass over a staged step: gives logits `[logit_rows, V]`.
pub type Forward<'a, B, E> = dyn FnMut(&Staged<B>) -> Result<<B as Backend>::Tensor, E> + 'a;
