//! The result of a case as JSON: the keys of the vLLM baselines, then percentiles and steps.

use serde_json::{Map, Value, json};

use super::case::{Case, Media};
use super::measure::{Measured, RequestTimes};
use super::memory::MemoryUse;
use super::steps::Steps;

/// One object of the report.
pub fn row(case: &Case, measured: &Measured, steps: Option<&Steps>, memory: Option<&MemoryUse>) -> Value {
    let tokens: u64 = measured.requests.iter().map(|request| request.tokens).sum();
    let prompt: u64 = measured.requests.iter().map(|request| request.prompt_tokens).sum();
    let per_second = |count: f64, digits: i32| rounded(count / measured.seconds.max(1e-9), digits);
    let requests = float(case.requests as u64);
    let first_prompt = measured.requests.first().map_or(0, |request| request.prompt_tokens);
    let mut row = Map::new();
    row.insert("s".into(), json!(rounded(measured.seconds, 3)));
    let mut rates = |pairs: Vec<(&str, Value)>| row.extend(pairs.into_iter().map(|(key, value)| (key.into(), value)));
    match case.media {
        Media::None if case.output == 1 => rates(vec![("tok_s", json!(per_second(float(prompt), 1)))]),
        Media::None => rates(vec![
            ("out_tok_s", json!(per_second(float(tokens), 1))),
            ("tot_tok_s", json!(per_second(float(tokens + prompt), 1))),
        ]),
        Media::Image { .. } => {
            rates(vec![("img_s", json!(per_second(requests, 2))), ("prompt_tok", json!(first_prompt))]);
        }
        Media::Clip { frames, .. } => rates(vec![
            ("clips_s", json!(per_second(requests, 2))),
            ("frames_s", json!(per_second(requests * f64::from(frames), 1))),
            ("prompt_tok", json!(first_prompt)),
        ]),
    }
    let all = |of: fn(&RequestTimes) -> Vec<f64>| measured.requests.iter().flat_map(of).collect::<Vec<f64>>();
    row.insert("ttft_ms".into(), percentiles(all(|request| request.first.into_iter().collect())));
    row.insert("itl_ms".into(), percentiles(all(|request| request.gaps.clone())));
    row.insert("e2e_ms".into(), percentiles(all(|request| vec![request.last])));
    if let Some(steps) = steps {
        row.insert("steps".into(), json!(steps));
    }
    if let Some(memory) = memory {
        row.insert("device_memory".into(), json!(memory));
    }
    Value::Object(row)
}

/// The line a person reads.
pub fn line(case: &Case, row: &Value) -> String {
    let rate = ["out_tok_s", "tok_s", "img_s", "clips_s"].iter().find_map(|key| Some((key, row.get(*key)?)));
    let (unit, value) = rate.map_or(("", &Value::Null), |(key, value)| (*key, value));
    let unit = match unit {
        "out_tok_s" => "output tok/s",
        "tok_s" => "prompt tok/s",
        "img_s" => "images/s",
        _ => "clips/s",
    };
    let at = |what: &str, which: &str| row[what][which].as_f64().unwrap_or(0.0);
    format!(
        "{:<28} {:>9.3} s {:>11} {unit:<13} ttft {:.1}/{:.1} ms  itl {:.2}/{:.2} ms (p50/p99)",
        case.key(),
        row["s"].as_f64().unwrap_or(0.0),
        value.to_string(),
        at("ttft_ms", "p50"),
        at("ttft_ms", "p99"),
        at("itl_ms", "p50"),
        at("itl_ms", "p99"),
    )
}

/// p50, p90, p99 and the mean of seconds, in milliseconds (nearest rank); null without values.
fn percentiles(mut seconds: Vec<f64>) -> Value {
    if seconds.is_empty() {
        return Value::Null;
    }
    seconds.sort_by(f64::total_cmp);
    let rank = |percent: usize| seconds[(seconds.len() * percent).div_ceil(100).max(1) - 1];
    let mean = seconds.iter().sum::<f64>() / float(seconds.len() as u64);
    let ms = |value: f64| rounded(value * 1000.0, 3);
    json!({ "p50": ms(rank(50)), "p90": ms(rank(90)), "p99": ms(rank(99)), "mean": ms(mean) })
}

#[allow(clippy::cast_precision_loss)] // Counts of tokens and requests, far below 2^52.
fn float(count: u64) -> f64 {
    count as f64
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(requests: usize) -> Measured {
        let one = RequestTimes { first: Some(0.1), last: 1.0, gaps: vec![0.01, 0.02], tokens: 3, prompt_tokens: 7 };
        Measured { seconds: 2.0, requests: vec![one; requests] }
    }

    #[test]
    fn rates_by_kind() {
        let text = row(&Case::text(4, 7, 3), &measured(4), None, None);
        assert_eq!((text["out_tok_s"].as_f64(), text["tot_tok_s"].as_f64()), (Some(6.0), Some(20.0)));
        let prefill = row(&Case::text(4, 7, 1), &measured(4), None, None);
        assert_eq!(prefill["tok_s"].as_f64(), Some(14.0));
        let media = Media::Clip { frames: 8, width: 4, height: 4 };
        let clips = row(&Case { requests: 4, input: 0, output: 3, media }, &measured(4), None, None);
        assert_eq!((clips["clips_s"].as_f64(), clips["frames_s"].as_f64()), (Some(2.0), Some(16.0)));
        assert_eq!(clips["prompt_tok"], 7);
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let values: Vec<f64> = (1..=200).map(|n| f64::from(n) / 1000.0).collect();
        let found = percentiles(values);
        assert_eq!((found["p50"].as_f64(), found["p99"].as_f64()), (Some(100.0), Some(198.0)));
        assert_eq!(percentiles(vec![0.5])["p99"].as_f64(), Some(500.0));
        assert_eq!(percentiles(Vec::new()), Value::Null);
    }
}
