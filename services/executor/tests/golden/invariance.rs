//! How a computation is cut must not show: equal bits in f32, whatever shares a step, however a prompt is chunked (also
//! through an image), wherever its blocks lie.

use millrace_executor::Dtype;
use millrace_executor::generate::{GenerateOptions, Generated};

use crate::fixture::Family;

const FAMILIES: [&str; 6] = ["qwen3_vl", "qwen3", "qwen3_moe", "glm4_moe_lite", "qwen3_moe_one", "glm4_moe_lite_one"];

fn bits(result: &Generated) -> Vec<Vec<u32>> {
    result.logits.iter().map(|row| row.logits.iter().map(|x| x.to_bits()).collect()).collect()
}

fn same(name: &str, options: &GenerateOptions, batched: bool) {
    let mut family = Family::open(name);
    let mut engine = family.engine(Dtype::F32);
    // Token by token a long prompt takes long and shows nothing that a short one does not.
    let longest = if options.chunk_tokens == Some(1) { 100 } else { usize::MAX };
    family.cases.retain(|case| case.ids.len() <= longest);
    let requests: Vec<_> = family.cases.iter().map(|case| case.greedy()).collect();
    let mut singles = Vec::new();
    for request in &requests {
        singles.extend(family.run(&mut engine, std::slice::from_ref(request), &GenerateOptions::default()));
    }
    let mut others = Vec::new();
    for group in requests.chunks(if batched { requests.len() } else { 1 }) {
        others.extend(family.run(&mut engine, group, options));
    }
    assert_eq!(singles.len(), others.len());
    for ((single, other), case) in singles.iter().zip(&others).zip(&family.cases) {
        assert_eq!(single.tokens, other.tokens, "{name} {}", case.name);
        assert!(bits(single) == bits(other), "{name} {}: logits differ", case.name);
    }
}

fn chunks(tokens: u32) -> GenerateOptions {
    GenerateOptions { chunk_tokens: Some(tokens), ..GenerateOptions::default() }
}

#[test]
fn batched_equals_single() {
    for name in FAMILIES {
        same(name, &GenerateOptions::default(), true);
    }
}

#[test]
fn chunked_equals_whole() {
    for name in FAMILIES {
        for tokens in [1, 3, 7] {
            same(name, &chunks(tokens), false);
        }
    }
}

#[test]
fn chunked_in_a_batch_equals_whole_alone() {
    for name in FAMILIES {
        same(name, &chunks(4), true);
    }
}

#[test]
fn shuffled_blocks_equal_contiguous_ones() {
    // 77 and 200 have no common factor: every block once, none beside its neighbour.
    let order: Vec<u32> = (0..200).map(|n| n * 77 % 200).collect();
    let options = GenerateOptions { chunk_tokens: Some(6), block_order: Some(order), ..GenerateOptions::default() };
    for name in FAMILIES {
        same(name, &options, true);
    }
}

#[test]
fn an_answer_computed_again_equals_the_one_that_was_drawn() {
    for name in FAMILIES {
        let mut family = Family::open(name);
        let mut engine = family.engine(Dtype::F32);
        for n in 0..family.cases.len() {
            let (drawn, known) = (family.cases[n].greedy(), family.cases[n].forced());
            let first = family.run(&mut engine, &[drawn], &GenerateOptions::default()).remove(0);
            let one_by_one = GenerateOptions { decode_answers: true, ..GenerateOptions::default() };
            for options in [GenerateOptions::default(), chunks(9), one_by_one] {
                let again = family.run(&mut engine, std::slice::from_ref(&known), &options).remove(0);
                assert_eq!(first.tokens, again.tokens);
                assert!(bits(&first) == bits(&again), "{name} {}: logits differ", family.cases[n].name);
            }
        }
    }
}
