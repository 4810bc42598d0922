//! Filters against transformers (tests/golden/sampling.py); draws against the probabilities they must follow.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Case {
    logits: Vec<f32>,
    history: Vec<u32>,
    settings: BTreeMap<String, f32>,
    probabilities: Vec<f64>,
}

fn sampling(settings: &BTreeMap<String, f32>) -> ResolvedSampling {
    let value = |key: &str, default: f32| settings.get(key).copied().unwrap_or(default);
    ResolvedSampling {
        temperature: value("temperature", 1.0),
        top_k: value("top_k", 0.0) as u32,
        top_p: value("top_p", 1.0),
        min_p: value("min_p", 0.0),
        repetition_penalty: value("repetition_penalty", 1.0),
        ..ResolvedSampling::greedy()
    }
}

#[test]
fn filters_leave_what_transformers_leaves() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/fixtures/sampling.json");
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(cases.len() > 30);
    for (n, case) in cases.iter().enumerate() {
        let sampling = sampling(&case.settings);
        let mut logits = case.logits.clone();
        let history = History::new(&sampling, &case.history, 5);
        process(&mut logits, &sampling, &history);
        let kept = filters::keep(&logits, &sampling);
        let total: f64 = kept.iter().map(|(_, logit)| f64::from(*logit).exp()).sum();
        let mut probabilities = vec![0.0; logits.len()];
        for (id, logit) in kept {
            probabilities[id as usize] = f64::from(logit).exp() / total;
        }
        // Which of several equal tokens lies on top-p's edge is left to torch's sort: only their number is compared.
        let sorted = |list: &[f64]| {
            let mut list = list.to_vec();
            list.sort_by(f64::total_cmp);
            list
        };
        for (got, expected) in sorted(&probabilities).iter().zip(sorted(&case.probabilities)) {
            assert!((got - expected).abs() < 1e-5, "case {n} {:?}: {got} for {expected}", case.settings);
        }
    }
}

fn row() -> Vec<f32> {
    vec![0.5, 2.0, -1.0, 2.0, 1.0]
}

#[test]
fn greedy_takes_the_lowest_of_equal_maxima() {
    let sampling = ResolvedSampling::greedy();
    let drawn = draw(&mut row(), &sampling, &History::default(), 0).unwrap();
    assert_eq!(drawn, Drawn { token: 1, logprobs: None });
}

#[test]
fn draws_follow_the_probabilities() {
    let sampling = ResolvedSampling { temperature: 1.0, seed: 11, ..ResolvedSampling::greedy() };
    let draws = 40_000u32;
    let mut counts = [0u32; 5];
    for position in 0..u64::from(draws) {
        let drawn = draw(&mut row(), &sampling, &History::default(), position).unwrap();
        counts[drawn.token as usize] += 1;
    }
    let total: f64 = row().iter().map(|x| f64::from(*x).exp()).sum();
    for (count, logit) in counts.iter().zip(row()) {
        let p = f64::from(logit).exp() / total;
        let deviation = (f64::from(*count) / f64::from(draws) - p).abs();
        let standard = (p * (1.0 - p) / f64::from(draws)).sqrt();
        assert!(deviation < 5.0 * standard, "{counts:?}");
    }
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let draws = |seed| -> Vec<u32> {
        let sampling = ResolvedSampling { temperature: 1.0, seed, ..ResolvedSampling::greedy() };
        (0..64).map(|n| draw(&mut row(), &sampling, &History::default(), n).unwrap().token).collect()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
}

#[test]
fn presence_and_frequency_count_the_answer_alone() {
    let sampling = ResolvedSampling { presence_penalty: 0.5, frequency_penalty: 0.25, ..ResolvedSampling::greedy() };
    // Tokens 0 and 1 are prompt; the answer holds 1 once and 3 twice.
    let mut history = History::new(&sampling, &[0, 1, 1, 3], 2);
    history.push(3);
    let mut logits = row();
    process(&mut logits, &sampling, &history);
    assert_eq!(logits, [0.5, 1.25, -1.0, 1.0, 1.0]);
}

#[test]
fn bias_comes_before_the_repetition_penalty() {
    let logit_bias = vec![(2, 3.0), (4, -2.0)];
    let sampling = ResolvedSampling { repetition_penalty: 2.0, logit_bias, ..ResolvedSampling::greedy() };
    let mut logits = row();
    process(&mut logits, &sampling, &History::new(&sampling, &[2, 4, 0], 3));
    assert_eq!(logits, [0.25, 2.0, 1.0, 2.0, -2.0]);
}

#[test]
fn logprobs_are_taken_before_temperature() {
    let sampling = ResolvedSampling { temperature: 0.1, logprobs: Some(3), ..ResolvedSampling::greedy() };
    let drawn = draw(&mut row(), &sampling, &History::default(), 0).unwrap();
    let logprobs = drawn.logprobs.unwrap();
    let log_sum = row().iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
    let close = |got: f32, logit: f64| (f64::from(got) - (logit - log_sum)).abs() < 1e-6;
    assert!(close(logprobs.chosen, f64::from(row()[drawn.token as usize])));
    assert_eq!(logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 4]);
    assert!(close(logprobs.top[2].1, 1.0));
}

#[test]
fn logits_that_are_no_numbers_end_the_sequence() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = row();
        logits[3] = bad;
        assert_eq!(draw(&mut logits, &ResolvedSampling::greedy(), &History::default(), 0), Err(NotFinite));
    }
}
