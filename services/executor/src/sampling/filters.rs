//! Temperature, top-k, top-p and min-p, in this order, and the draw from what they leave. Thresholds as transformers'
//! warpers have them; sums in f64, so that no order of summation moves a threshold.

use std::cmp::Ordering;

use millrace_protocol::sampling::ResolvedSampling;

/// A token that may be drawn and its logit after temperature.
pub(super) type Candidate = (u32, f32);

/// Candidates that the filters leave; never empty for a non-empty row. Order is unspecified.
pub(super) fn keep(logits: &[f32], sampling: &ResolvedSampling) -> Vec<Candidate> {
    let mut kept: Vec<Candidate> = (0u32..).zip(logits.iter().map(|logit| logit / sampling.temperature)).collect();
    top_k(&mut kept, sampling.top_k as usize);
    if sampling.top_p < 1.0 {
        top_p(&mut kept, f64::from(sampling.top_p));
    }
    if sampling.min_p > 0.0 {
        min_p(&mut kept, f64::from(sampling.min_p));
    }
    kept
}

/// The `count` likeliest token ids, most likely first, ties by id.
pub(super) fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let mut all: Vec<Candidate> = (0u32..).zip(logits.iter().copied()).collect();
    if let Some(last) = count.checked_sub(1).filter(|last| *last < all.len()) {
        all.select_nth_unstable_by(last, descending);
    }
    all.truncate(count);
    all.sort_unstable_by(descending);
    all.into_iter().map(|(id, _)| id).collect()
}

/// Draws with `u` in [0, 1): the first candidate in order of id whose cumulative share exceeds it.
pub(super) fn choose(kept: &[Candidate], u: f64) -> u32 {
    let mut ordered = kept.to_vec();
    ordered.sort_unstable_by_key(|(id, _)| *id);
    let highest = highest(&ordered);
    let weight = |logit: f32| (f64::from(logit) - highest).exp();
    let total: f64 = ordered.iter().map(|(_, logit)| weight(*logit)).sum();
    let mut rest = u * total;
    let mut last = 0;
    for (id, logit) in ordered {
        let share = weight(logit);
        if share > 0.0 {
            last = id;
        }
        if rest < share {
            return id;
        }
        rest -= share;
    }
    last
}

/// Most likely first, ties by id.
fn descending(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn highest(kept: &[Candidate]) -> f64 {
    kept.iter().map(|(_, logit)| f64::from(*logit)).fold(f64::NEG_INFINITY, f64::max)
}

/// Keeps what is at least as likely as the k-th: ties at the k-th all stay.
fn top_k(kept: &mut Vec<Candidate>, k: usize) {
    if let Some(kth) = k.checked_sub(1).filter(|kth| *kth < kept.len()) {
        let threshold = kept.select_nth_unstable_by(kth, descending).1.1;
        kept.retain(|(_, logit)| *logit >= threshold);
    }
}

/// Drops, from the least likely up, what brings the cumulative probability to at most 1 - p; the most likely always stays.
fn top_p(kept: &mut Vec<Candidate>, p: f64) {
    kept.sort_unstable_by(descending);
    let highest = highest(kept);
    let total: f64 = kept.iter().map(|(_, logit)| (f64::from(*logit) - highest).exp()).sum();
    let mut tail = 0.0;
    let mut length = kept.len();
    for (_, logit) in kept.iter().skip(1).rev() {
        tail += (f64::from(*logit) - highest).exp() / total;
        if tail > 1.0 - p {
            break;
        }
        length -= 1;
    }
    kept.truncate(length);
}

/// Drops what is less likely than `p` times the most likely.
fn min_p(kept: &mut Vec<Candidate>, p: f64) {
    let highest = highest(kept);
    kept.retain(|(_, logit)| (f64::from(*logit) - highest).exp() >= p);
}
