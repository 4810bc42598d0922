//! bf16 against transformers' f32: no worse than transformers' own bf16, since the rounding points are the same.

use millrace_executor::StepEngine;
use millrace_executor::generate::GenerateOptions;

use crate::fixture::{Case, Family};

/// Largest share of transformers' own error: of the largest error over a fixture's cases, and for each case of the root mean
/// square and of what one logit in a thousand exceeds.
///
/// The largest error of one case is one draw: two correct bf16 implementations differ in it by a third. Over all cases of a
/// fixture it is the largest of a quarter of a million logits, which says something about the arithmetic.
const SHARE: f32 = 1.25;

/// Runs the family's cases with the reference's answers given, one by one or side by side, and holds them to the bars.
pub fn check(name: &str, family: &mut Family, engine: &mut dyn StepEngine, options: &GenerateOptions, together: bool) {
    let requests: Vec<_> = family.cases.iter().map(Case::forced).collect();
    let mut results = Vec::new();
    for group in requests.chunks(if together { requests.len() } else { 1 }) {
        results.extend(family.run(engine, group, options));
    }
    let (mut ours, mut theirs, mut compared, mut rows) = (0.0, 0.0, 0, 0);
    for (case, result) in family.cases.iter().zip(&results) {
        let differences = case.compare(result);
        let (max, high, rms) = (case.bf16_max_error, case.bf16_high_error, case.bf16_rms_error);
        println!("{name} {}: {differences:?}; transformers max {max} high {high} rms {rms}", case.name);
        assert!(differences.rms <= SHARE * rms, "{name} {}: {differences:?}", case.name);
        assert!(differences.high <= SHARE * high, "{name} {}: {differences:?}", case.name);
        ours = f32::max(ours, differences.max);
        theirs = f32::max(theirs, case.bf16_max_error);
        for (row, golden) in result.logits.iter().zip(&case.logits) {
            let (best, gap) = best_and_gap(golden);
            rows += 1;
            if gap > case.bf16_max_error {
                compared += 1;
                assert_eq!(best_and_gap(&row.logits).0, best, "{name} {} token {}", case.name, row.index);
            }
        }
    }
    println!("{name}: max error {ours}, transformers {theirs}; {compared} of {rows} greedy tokens decided");
    assert!(ours <= SHARE * theirs, "{name}: max error {ours}, transformers {theirs}");
    assert!(compared * 2 > rows, "only {compared} of {rows} tokens stand out");
}

fn best_and_gap(row: &[f32]) -> (usize, f32) {
    let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
    let second = row.iter().enumerate().filter(|(n, _)| *n != best).map(|(_, x)| *x).fold(f32::MIN, f32::max);
    (best, row[best] - second)
}
