//! Speed of an engine alone, without queue or tokeniser: text requests submitted at once, greedy, ends ignored.
//!
//!     cargo bench -p millrace-executor --features cuda --bench engine -- MODEL_DIR DEVICE N:INPUT:OUTPUT...
//!
//! DEVICE is `cpu` or `cuda`. Prints one JSON object with the keys of shared/baselines: seconds, output and total tokens a second,
//! and the median time of a step in which everyone decodes.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // A tool for developers.

use std::path::Path;
use std::time::Instant;

use millrace_executor::generate::{GenerateOptions, Request, generate};
use millrace_executor::{DeviceKind, KvBudget, LoadOptions, MediaSource, load};
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ActorId, ErrorCode, JobError, ModelName, PageRef};

struct NoMedia;

impl MediaSource for NoMedia {
    fn patches(&mut self, _: &PageRef) -> Result<bytes::Bytes, JobError> {
        Err(JobError::new(ErrorCode::MediaType, "text alone"))
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [folder, device, cases @ ..] = arguments.as_slice() else {
        println!("arguments: MODEL_DIR DEVICE N:INPUT:OUTPUT...");
        return;
    };
    let device = if device == "cuda" { DeviceKind::Cuda(0) } else { DeviceKind::Cpu };
    let cases: Vec<Vec<usize>> =
        cases.iter().map(|case| case.split(':').map(|number| number.parse().unwrap()).collect()).collect();
    let blocks = cases.iter().map(|case| case[0] * (case[1] + case[2]).div_ceil(16)).max().unwrap_or(1);
    let slots = cases.iter().map(|case| case[0]).max().unwrap_or(1);
    let options = LoadOptions {
        device,
        dtype: device.default_dtype(),
        kv: KvBudget::Blocks(u32::try_from(blocks).unwrap()),
        slots: u32::try_from(slots).unwrap(),
        step_tokens: 8192,
        ..LoadOptions::in_process(ModelName::new("bench").unwrap(), ActorId::new("bench").unwrap())
    };
    let loading = Instant::now();
    let mut engine = load(Path::new(folder), &options).unwrap();
    let mut lines = vec![format!("\"load_s\": {:.3}", loading.elapsed().as_secs_f64())];
    let vocab = engine.spec().vocab;
    let mut state = 1u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % vocab
    };
    for case in cases {
        let (n, input, output) = (case[0], case[1], case[2]);
        let mut times = Vec::new();
        // The first round records steps and chooses algorithms.
        for _ in 0..2 {
            let request = |_| Request {
                prompt: (0..input).map(|_| token()).collect(),
                answer: Vec::new(),
                media: Vec::new(),
                sampling: ResolvedSampling::greedy(),
                max_tokens: output,
                stop_token_ids: Vec::new(),
            };
            let requests: Vec<Request> = (0..n).map(request).collect();
            times.clear();
            times.push(Instant::now());
            let on_token = &mut |_: usize, _: u32| times.push(Instant::now());
            generate(engine.as_mut(), &requests, &GenerateOptions::default(), &mut NoMedia, on_token).unwrap();
        }
        let seconds = times[times.len() - 1].duration_since(times[0]).as_secs_f64();
        // Tokens of one step come together; the gap between the last token of one step and that of the next is a step.
        let ends: Vec<Instant> = times[1..].chunks(n).map(|step| step[step.len() - 1]).collect();
        let mut steps: Vec<f64> = ends.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_secs_f64()).collect();
        steps.sort_by(f64::total_cmp);
        let median = steps.get(steps.len() / 2).copied().unwrap_or(0.0);
        let first = times[1].duration_since(times[0]).as_secs_f64();
        lines.push(format!(
            "\"n{n}_in{input}_out{output}\": {{\"s\": {seconds:.4}, \"out_tok_s\": {:.1}, \"tot_tok_s\": {:.1}, \
             \"first_token_s\": {first:.4}, \"step_ms\": {:.4}, \"decode_tok_s\": {:.1}}}",
            (n * output) as f64 / seconds,
            (n * (input + output)) as f64 / seconds,
            median * 1e3,
            n as f64 / median,
        ));
    }
    println!("{{{}}}", lines.join(",\n "));
}
