//! f32 against transformers' f32.

use millrace_executor::positions::Positions;
use millrace_executor::{Dtype, StepEngine};

use crate::fixture::Family;

/// Of the standard deviation of the golden logits.
pub const TOLERANCE: f32 = 1e-4;

fn check(name: &str) {
    let mut family = Family::open(name);
    let mut engine = family.engine(Dtype::F32);
    for n in 0..family.cases.len() {
        let request = family.cases[n].greedy();
        let result = family.run(&mut engine, &[request], &Default::default()).remove(0);
        let case = &family.cases[n];
        let differences = case.compare(&result);
        println!("{name} {}: {differences:?}, spread {}", case.name, case.spread);
        assert_eq!(result.tokens, case.answer, "{name} {}", case.name);
        assert_eq!(differences.rows, case.ids.len() + case.answer.len() - 1);
        assert!(differences.max <= TOLERANCE * case.spread, "{name} {}: {differences:?}", case.name);
    }
    assert_eq!(engine.spec().model.as_str(), "tiny");
}

#[test]
fn qwen3_vl_gives_transformers_logits_and_answers() {
    check("qwen3_vl");
}

#[test]
fn qwen3_gives_transformers_logits_and_answers() {
    check("qwen3");
}

#[test]
fn qwen3_moe_gives_transformers_logits_and_answers() {
    check("qwen3_moe");
}

#[test]
fn glm4_moe_lite_gives_transformers_logits_and_answers() {
    check("glm4_moe_lite");
}

#[test]
fn one_expert_a_token_gives_transformers_logits_and_answers() {
    check("qwen3_moe_one");
    check("glm4_moe_lite_one");
}

#[test]
fn positions_are_transformers_positions() {
    let family = Family::open("qwen3_vl");
    let mut seen = 0;
    for case in family.cases.iter().filter(|case| !case.media.is_empty()) {
        let positions = Positions::with_media(&case.media, 2);
        let all: Vec<[u32; 3]> = (0..case.ids.len()).map(|n| positions.of(n as u32)).collect();
        assert_eq!(all, case.positions, "{}", case.name);
        assert_eq!(positions.delta(), case.rope_delta, "{}", case.name);
        seen += 1;
    }
    assert!(seen >= 6);
}
