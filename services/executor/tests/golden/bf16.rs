//! bf16 on the CPU against transformers' f32.

use millrace_executor::Dtype;
use millrace_executor::generate::GenerateOptions;

use crate::fixture::Family;
use crate::share;

fn check(name: &str) {
    let mut family = Family::open(name);
    let mut engine = family.engine(Dtype::Bf16);
    share::check(name, &mut family, &mut engine, &GenerateOptions::default(), false);
}

#[test]
fn qwen3_vl_is_as_exact_as_transformers() {
    check("qwen3_vl");
}

#[test]
fn qwen3_is_as_exact_as_transformers() {
    check("qwen3");
}

#[test]
fn qwen3_moe_is_as_exact_as_transformers() {
    check("qwen3_moe");
}

#[test]
fn glm4_moe_lite_is_as_exact_as_transformers() {
    check("glm4_moe_lite");
}

#[test]
fn one_expert_a_token_is_as_exact_as_transformers() {
    check("qwen3_moe_one");
    check("glm4_moe_lite_one");
}
