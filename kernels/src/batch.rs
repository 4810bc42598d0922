//! Checks of a ragged batch against the pool it reads, and walks over it.

use crate::error::KernelError;
use crate::step::Ragged;
use crate::view::shape_error;

/// Errors unless `batch` describes `rows` query rows over a pool of `blocks` pages of `block_tokens` tokens.
pub(crate) fn check(
    op: &'static str,
    batch: &Ragged,
    rows: usize,
    blocks: usize,
    block_tokens: usize,
) -> Result<(), KernelError> {
    let sequences = batch.context.len();
    if batch.query_start.len() != sequences + 1 || batch.blocks.len() != sequences {
        return Err(shape_error(
            op,
            format!(
                "{sequences} contexts, {} query starts and {} block tables",
                batch.query_start.len(),
                batch.blocks.len()
            ),
        ));
    }
    if batch.query_start[0] != 0 || batch.query_start[sequences] as usize != rows {
        return Err(shape_error(op, format!("query starts {:?} do not span {rows} rows", batch.query_start)));
    }
    for sequence in 0..sequences {
        let (start, end) = (batch.query_start[sequence], batch.query_start[sequence + 1]);
        let context = batch.context[sequence];
        let queries = end.checked_sub(start).filter(|&queries| queries <= context);
        if queries.is_none() {
            return Err(shape_error(op, format!("sequence {sequence}: rows {start}..{end} with context {context}")));
        }
        let needed = (context as usize).div_ceil(block_tokens);
        let table = &batch.blocks[sequence];
        if table.len() < needed {
            return Err(shape_error(op, format!("sequence {sequence}: {} blocks, {needed} needed", table.len())));
        }
        if let Some(&block) = table[..needed].iter().find(|&&block| block as usize >= blocks) {
            return Err(KernelError::Index { op, index: u64::from(block), limit: blocks as u64 });
        }
    }
    Ok(())
}

/// Query rows of sequence `i` and the position of its first one.
pub(crate) fn queries(batch: &Ragged, sequence: usize) -> (std::ops::Range<usize>, usize) {
    let rows = batch.query_start[sequence] as usize..batch.query_start[sequence + 1] as usize;
    let first = batch.context[sequence] as usize - rows.len();
    (rows, first)
}

/// Block and row of every query token.
pub(crate) fn places(batch: &Ragged, block_tokens: usize) -> Vec<(usize, usize)> {
    let mut places = Vec::new();
    for (sequence, blocks) in batch.blocks.iter().enumerate() {
        let (rows, first) = queries(batch, sequence);
        let positions = first..first + rows.len();
        places.extend(positions.map(|t| (blocks[t / block_tokens] as usize, t % block_tokens)));
    }
    places
}

/// The batch of the last `rows` query rows of each of these `(sequence, rows)`.
pub(crate) fn part(batch: &Ragged, sequences: &[(usize, u32)]) -> Ragged {
    let mut part = Ragged { query_start: vec![0], ..Ragged::default() };
    let mut end = 0;
    for &(sequence, rows) in sequences {
        end += rows;
        part.query_start.push(end);
        part.context.push(batch.context[sequence]);
        part.blocks.push(batch.blocks[sequence].clone());
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::StepInputs;

    fn tail(query_start: &[u32], logit_rows: &[u32]) -> Option<Vec<(usize, u32)>> {
        let ids = vec![0; *query_start.last().unwrap() as usize];
        let ragged = Ragged { query_start: query_start.to_vec(), ..Ragged::default() };
        StepInputs { ids, ragged, logit_rows: logit_rows.to_vec(), ..StepInputs::default() }.tail()
    }

    #[test]
    fn a_tail_is_the_last_rows_of_some_sequences() {
        assert_eq!(tail(&[0, 4, 5, 9], &[3, 4]), Some(vec![(0, 1), (1, 1)]));
        assert_eq!(tail(&[0, 4, 5, 9], &[7, 8]), Some(vec![(2, 2)]));
        assert_eq!(tail(&[0, 4, 5, 9], &[]), Some(vec![]));
        assert_eq!(tail(&[0, 2], &[0, 1]), None, "every row");
        assert_eq!(tail(&[0, 4, 5, 9], &[2, 4]), None, "not the last of its sequence");
        assert_eq!(tail(&[0, 4, 5, 9], &[8, 4]), None, "not in order");
        assert_eq!(tail(&[0, 4], &[9]), None, "no such row");
    }

    #[test]
    fn a_part_keeps_contexts_and_tables() {
        let batch = Ragged {
            query_start: vec![0, 4, 5, 9],
            context: vec![7, 20, 4],
            blocks: vec![vec![1], vec![2, 3], vec![4]],
        };
        let part = part(&batch, &[(0, 1), (2, 3)]);
        assert_eq!((part.query_start, part.context), (vec![0, 1, 4], vec![7, 4]));
        assert_eq!(part.blocks, [vec![1], vec![4]]);
    }
}
