//! One ragged batch out of the step's work. Order of rows: the plan's.

use millrace_kernels::{Backend, Ragged, StepInputs};

use super::slot::Slot;
use crate::error::ExecutorError;
use crate::layers::vision::VisionFeatures;
use crate::step_batch::VisionRows;

/// A slot's share of a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    pub slot: u32,
    pub count: usize,
    pub sample: bool,
}

/// Builds the inputs of a step over blocks of `block_tokens`. Every placeholder among the tokens has its features by now. With
/// `all_logits` every row's logits are asked for, otherwise the last row's of each share that samples.
///
/// Where `single_rows_differ`, tokens of a prompt are computed together and those of an answer one by one, however the step is
/// cut: a lone row of a prompt takes the row before it along (which writes what is there already), rows of an answer that is
/// computed again stand as sequences of their own.
pub(super) fn assemble<'s, B: Backend + 's>(
    backend: &B,
    shares: impl Iterator<Item = (Share, &'s Slot<B>)>,
    block_tokens: usize,
    all_logits: bool,
    single_rows_differ: bool,
) -> Result<(StepInputs, Option<VisionRows<B>>), ExecutorError> {
    let ragged = Ragged { query_start: vec![0], ..Ragged::default() };
    let mut inputs = StepInputs { ragged, block_tokens, ..StepInputs::default() };
    let mut rows = Vec::new();
    let mut parts = Vec::new();
    for (share, slot) in shares {
        let tokens = slot.next(share.count);
        let again = usize::from(single_rows_differ && slot.lone_prompt_row(share.count));
        let rows_of = tokens.start - again..tokens.end;
        let first_row = inputs.ids.len() + again;
        let mut end_row = inputs.ids.len();
        inputs.ids.extend(slot.tokens.get(rows_of.clone()).unwrap_or_default());
        inputs.positions.extend(rows_of.clone().map(|index| slot.positions.of(index as u32)));
        let together = if single_rows_differ { tokens.end.min(slot.prompt_tokens) } else { tokens.end };
        let first = (together > rows_of.start).then_some(together);
        let mut start = rows_of.start;
        for end in first.into_iter().chain(together.max(rows_of.start) + 1..=tokens.end) {
            end_row += end - start;
            start = end;
            inputs.ragged.query_start.push(end_row as u32);
            inputs.ragged.context.push(end as u32);
            inputs.ragged.blocks.push(slot.blocks.clone());
        }
        for item in &slot.media {
            let overlap = item.overlap(&tokens);
            let (Some(features), false) = (&item.features, overlap.is_empty()) else { continue };
            let span = item.span();
            rows.extend(overlap.clone().map(|index| (first_row + index - tokens.start) as u32));
            parts.push(features.row_range(backend, overlap.start - span.start..overlap.end - span.start)?);
        }
        let last_row = inputs.ids.len() - 1;
        match (all_logits, share.sample) {
            (true, _) => inputs.logit_rows.extend((first_row..=last_row).map(|row| row as u32)),
            (false, true) => inputs.logit_rows.push(last_row as u32),
            (false, false) => {}
        }
    }
    let features = VisionFeatures::concat(backend, parts)?;
    let vision = match features {
        Some(features) => Some(VisionRows { rows: backend.indices(rows)?, features }),
        None => None,
    };
    let sequences = inputs.ragged.context.len();
    inputs.replayable = vision.is_none() && inputs.ids.len() == sequences && inputs.logit_rows.len() == sequences;
    Ok((inputs, vision))
}
