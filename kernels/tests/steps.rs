//! Steps on the CPU: what one draws, the next one may name in its ids.
#![allow(clippy::unwrap_used)] // Tests.

use candle_core::DType;
use millrace_kernels::{Backend, CpuBackend, Draw, Finished, KernelError, Ragged, StepInputs};

fn inputs(ids: Vec<u32>) -> StepInputs {
    let rows = ids.len() as u32;
    let ragged = Ragged { query_start: vec![0, rows], context: vec![rows], blocks: vec![vec![0]] };
    let (positions, logit_rows) = (vec![[0; 3]; ids.len()], (0..rows).collect());
    StepInputs { ids, positions, ragged, block_tokens: 16, logit_rows, replayable: false }
}

/// Runs a step whose logits are `logits [ids, 4]`; gives the ids that the forward pass saw.
fn step(backend: &CpuBackend, ids: Vec<u32>, logits: &[f32], draws: bool) -> Result<(Vec<u32>, Finished), KernelError> {
    let rows = ids.len();
    let mut seen = Vec::new();
    let logits = backend.step::<KernelError>(inputs(ids), &mut |staged| {
        seen = staged.ids.clone();
        backend.upload(logits, &[rows, 4])
    })?;
    let draws = draws.then(|| vec![Draw::GREEDY; rows]);
    let flight = backend.finish(draws.as_ref().map(|draws| (&logits, draws.as_slice())))?;
    assert!(backend.has_finished(&flight)?);
    Ok((seen, backend.finished(flight)?))
}

#[test]
fn ids_stand_for_draws_of_the_step_before() {
    for dtype in [DType::F32, DType::BF16] {
        let backend = CpuBackend::new(dtype).unwrap();
        let drawn = StepInputs::drawn;
        let logits = [0.0, 1.0, 5.0, 2.0, f32::NAN, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0];
        let (seen, finished) = step(&backend, vec![3, 1, 2], &logits, true).unwrap();
        assert_eq!(seen, [3, 1, 2]);
        assert_eq!(finished, Finished { drawn: vec![Some(2), None, Some(3)], times: None });
        // A row without a token, out of order, beside a known id.
        let (seen, _) = step(&backend, vec![drawn(2), drawn(1), 1, drawn(0)], &[1.0; 16], true).unwrap();
        assert_eq!(seen, [3, 0, 1, 2]);
        assert!(matches!(step(&backend, vec![drawn(4)], &[1.0; 4], true), Err(KernelError::Index { index: 4, .. })));
        let (_, finished) = step(&backend, vec![drawn(3)], &[1.0; 4], false).unwrap();
        assert_eq!(finished.drawn, []);
        assert!(matches!(step(&backend, vec![drawn(0)], &[1.0; 4], true), Err(KernelError::Index { .. })));
    }
}

#[test]
fn random_draws_are_the_hosts() {
    let backend = CpuBackend::new(DType::F32).unwrap();
    let random = Draw { temperature: 1.0, ..Draw::GREEDY };
    assert!(backend.draws(&[Draw::GREEDY]) && !backend.draws(&[Draw::GREEDY, random]));
    let logits = backend.step::<KernelError>(inputs(vec![1]), &mut |_| backend.upload(&[1.0; 4], &[1, 4])).unwrap();
    assert!(backend.finish(Some((&logits, &[random]))).is_err());
}
