//! Every flag does what its help says.

use millrace_tests::workspace::root;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::program::{answer, clip, demo, fault, list, prepared, run, tokens};

/// Stops after an end-of-text token unless told otherwise: long enough to reach one.
const LONG: &str = "60";

#[test]
fn the_last_line_is_one_object_with_the_answer() {
    let got = answer(&["--prompt", "What is this?", "--image", &clip("one-shape.png"), "--greedy"]).unwrap();
    let keys: Vec<&str> = got.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["token_ids", "text", "finish_reason", "usage", "timings"]);
    let count = tokens(&got).len() as u64;
    assert!(count > 0 && got["text"].as_str().unwrap().len() > 3, "{got}");
    assert_eq!(got["finish_reason"], "stop");
    // The end-of-text token is counted but not listed.
    assert_eq!(got["usage"]["completion_tokens"], count + 1);
    assert!(got["usage"]["prompt_tokens"].as_u64().unwrap() > 10);
    for time in ["load_ms", "preprocess_ms", "first_token_ms", "total_ms"] {
        assert!(got["timings"][time].as_f64().unwrap() >= 0.0, "{time}");
    }
}

#[test]
fn without_json_the_text_is_printed() {
    let args = ["--prompt", "Hi", "--greedy", "--max-tokens", "9"];
    let output = run(&demo(), &args).unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.strip_suffix('\n').unwrap(), answer(&args).unwrap()["text"].as_str().unwrap());
}

#[test]
fn answers_end_where_they_are_told_to() {
    let short = answer(&["--prompt", "Hi", "--greedy", "--max-tokens", "3", "--ignore-eos"]).unwrap();
    assert_eq!((tokens(&short).len(), &short["finish_reason"]), (3, &json!("length")));
    let stopped = answer(&["--prompt", "Hi", "--greedy", "--max-tokens", LONG]).unwrap();
    let on = answer(&["--prompt", "Hi", "--greedy", "--max-tokens", LONG, "--ignore-eos"]).unwrap();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(tokens(&on).len(), 60);
    assert!(tokens(&stopped).len() < 60 && tokens(&on).starts_with(&tokens(&stopped)));
}

#[test]
fn greedy_takes_the_likeliest_and_a_seed_repeats_a_draw() {
    let args =
        ["--prompt", "Describe the image.", "--image", &clip("two-shapes.jpg"), "--max-tokens", "12", "--ignore-eos"];
    let with = |more: &[&str]| tokens(&answer(&[&args, more].concat()).unwrap());
    assert_eq!(with(&["--greedy"]), with(&["--greedy"]));
    assert_eq!(with(&["--seed", "7"]), with(&["--seed", "7"]));
}

#[test]
fn logprobs_and_logits_are_of_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("logits.safetensors").display().to_string();
    let args =
        ["--prompt", "Hi", "--greedy", "--max-tokens", "5", "--ignore-eos", "--logprobs", "4", "--dump-logits", &file];
    let got = answer(&args).unwrap();
    let (drawn, prompt) = (tokens(&got), got["usage"]["prompt_tokens"].as_u64().unwrap() as usize);
    let bytes = std::fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (logits, index) = (tensors.tensor("logits").unwrap(), tensors.tensor("index").unwrap());
    // Every position of the prompt and every answer token but the last, which nobody computed on.
    assert_eq!(logits.shape(), [prompt + 4, 1024]);
    let index: Vec<i64> = index.data().chunks(8).map(|eight| i64::from_le_bytes(eight.try_into().unwrap())).collect();
    assert_eq!(index, (0..prompt as i64 + 4).collect::<Vec<_>>());
    let rows: Vec<Vec<f32>> = logits
        .data()
        .chunks(4 * 1024)
        .map(|row| row.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect())
        .collect();
    assert_eq!(got["logprobs"].as_array().unwrap().len(), 5);
    for (n, token) in drawn.iter().enumerate() {
        let row = &rows[prompt - 1 + n];
        let largest = row.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(row[*token as usize], largest, "the likeliest token was drawn");
        let total = row.iter().map(|x| f64::from(x - largest).exp()).sum::<f64>().ln();
        let entry = &got["logprobs"][n];
        assert!((entry["chosen"].as_f64().unwrap() + total).abs() < 1e-4, "{entry}");
        let top = entry["top"].as_array().unwrap();
        assert_eq!((top.len(), &top[0][0]), (4, &json!(token)));
        assert!(top.windows(2).all(|pair| pair[0][1].as_f64() >= pair[1][1].as_f64()));
        for pair in top {
            let truth = f64::from(row[pair[0].as_u64().unwrap() as usize] - largest) - total;
            assert!((pair[1].as_f64().unwrap() - truth).abs() < 1e-4);
        }
    }
}

#[test]
fn precision_is_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let dump = |dtype: &str| {
        let file = folder.path().join(dtype).display().to_string();
        answer(&["--prompt", "Hi", "--max-tokens", "1", "--greedy", "--dtype", dtype, "--dump-logits", &file]).unwrap();
        std::fs::read(&file).unwrap()
    };
    let last_bits = |bytes: &[u8]| {
        let tensors = SafeTensors::deserialize(bytes).unwrap();
        tensors.tensor("logits").unwrap().data().chunks(4).map(|four| u16::from_le_bytes([four[0], four[1]])).max()
    };
    // A bf16 number in f32 has nothing in its lower half.
    assert_eq!(last_bits(&dump("bf16")), Some(0));
    assert_ne!(last_bits(&dump("f32")), Some(0));
}

#[test]
fn raw_text_and_ids_pass_the_template_by() {
    let text = "The image shows";
    let raw = answer(&["--prompt", text, "--raw", "--greedy", "--max-tokens", "5"]).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ids = runtime.block_on(prepared(json!({"prompt": text}))).unwrap().prompt;
    assert_eq!(raw["usage"]["prompt_tokens"], ids.len());
    let by_ids = answer(&["--ids", &list(&ids), "--greedy", "--max-tokens", "5"]).unwrap();
    assert_eq!(tokens(&raw), tokens(&by_ids));
    let chat = answer(&["--prompt", text, "--greedy", "--max-tokens", "5"]).unwrap();
    assert!(chat["usage"]["prompt_tokens"].as_u64() > raw["usage"]["prompt_tokens"].as_u64());
}

#[test]
fn messages_come_as_a_list_or_as_a_job() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, value: &Value| {
        let path = folder.path().join(name);
        std::fs::write(&path, value.to_string()).unwrap();
        path.display().to_string()
    };
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is this?"}]);
    let list = file("list.json", &messages);
    let common = ["--greedy", "--max-tokens", "7"];
    let of = |args: &[&str]| answer(&[args, &common].concat()).unwrap();
    let alone = of(&["--messages", &list]);
    let job = file("job.json", &json!({"messages": messages, "max_tokens": 2}));
    assert_eq!(tokens(&alone), tokens(&of(&["--messages", &job])), "a flag goes before the document");
    assert_eq!(tokens(&answer(&["--messages", &job]).unwrap()).len(), 2);
    // Media from flags go into the last user message.
    let seen = of(&["--messages", &list, "--image", &clip("one-shape.png")]);
    assert!(seen["usage"]["prompt_tokens"].as_u64() > alone["usage"]["prompt_tokens"].as_u64());
}

/// Several images, videos and frame lists, given as flags beside a prompt, and beside ids that hold their placeholders already.
#[test]
fn media_fill_placeholders_in_order() {
    let (still, other) = (clip("one-shape.png"), clip("two-shapes.jpg"));
    let (video, short) = (clip("one-shape.mp4"), clip("two-shapes.mp4"));
    let frames = [format!("{still},{still}"), format!("{other},{other},{other}")];
    let media = [
        "--image", &still, "--image", &other, "--video", &video, "--video", &short, "--frames", &frames[0], "--fps",
        "2", "--frames", &frames[1], "--fps", "4",
    ];
    let common = ["--greedy", "--max-tokens", "8", "--ignore-eos"];
    let of = |args: &[&str]| answer(&[args, &media, &common].concat());
    let part = |kind: &str, path: &str| json!({"type": kind, "object": path});
    let list_of = |paths: &str, fps: f64| {
        let frames: Vec<Value> = paths.split(',').map(|path| json!({"object": path})).collect();
        json!({"type": "frames", "fps": fps, "frames": frames})
    };
    // Images, then videos, then frames, then the text: the order of the flags' help.
    let content = json!([
        part("image", &still), part("image", &other), part("video", &video), part("video", &short),
        list_of(&frames[0], 2.0), list_of(&frames[1], 4.0), {"type": "text", "text": "Compare."}
    ]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ready = runtime.block_on(prepared(json!({"messages": [{"role": "user", "content": content}]})));
    let ready = ready.unwrap();
    assert!(ready.media.len() > 6);
    let by_prompt = of(&["--prompt", "Compare."]).unwrap();
    assert_eq!(by_prompt["usage"]["prompt_tokens"], ready.prompt.len());
    let by_ids = of(&["--ids", &list(&ready.prompt)]).unwrap();
    assert_eq!(tokens(&by_prompt), tokens(&by_ids));
    assert_eq!(by_ids["usage"], by_prompt["usage"]);
    // The other way round they do not fit.
    let (first, second) = (clip("three-shapes.png"), still.clone());
    let pair = [part("image", &first), part("image", &second)];
    let ids = runtime.block_on(prepared(json!({"messages": [{"role": "user", "content": pair}]}))).unwrap().prompt;
    let ids = list(&ids);
    assert!(answer(&["--ids", &ids, "--image", &first, "--image", &second, "--max-tokens", "1"]).is_ok());
    let (_, said) = fault(&demo(), &["--ids", &ids, "--image", &second, "--image", &first]).unwrap();
    assert!(said.contains("image placeholders"), "{said}");
}

#[test]
fn a_rate_samples_videos() {
    let video = clip("three-scenes.mp4");
    let of = |rate: &str| {
        let args = ["--prompt", "x", "--video", &video, "--fps", rate, "--max-tokens", "1"];
        answer(&args).unwrap()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert!(of("2") > of("0.5"));
}

#[test]
fn a_repository_of_random_weights_generates() {
    let folder = tempfile::tempdir().unwrap();
    let fixture = root().join("tests/golden/fixtures/glm4_moe_lite");
    let to = folder.path().display().to_string();
    let args =
        ["random-weights", "--config", &fixture.display().to_string(), "--out", &to, "--layers", "2", "--seed", "5"];
    let output = std::process::Command::new(millrace_tests::service::binary().unwrap()).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(demo().join(file), folder.path().join(file)).unwrap();
    }
    let output =
        run(folder.path(), &["--ids", "5,6,7", "--greedy", "--max-tokens", "4", "--ignore-eos", "--json"]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let got: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((tokens(&got).len(), &got["usage"]["prompt_tokens"]), (4, &json!(3)));
}
