//! Bad input of every kind of issue 3: a typed error each, exit code 64, a text that names what to change.

use std::path::Path;

use crate::program::{clip, demo, fault, list, run};

/// A copy of the demo checkpoint to spoil.
fn spoiled(change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(demo()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    change(folder.path());
    folder
}

fn expect(model: &Path, args: &[&str], words: &[&str]) {
    let (code, said) = fault(model, args).unwrap();
    assert_eq!(code, 64, "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said:?}");
    }
}

#[test]
fn prompts_that_no_model_can_take() {
    let model = demo();
    expect(&model, &["--ids", "5,1024"], &["token_range (400)", "1024", "0 to 1023"]);
    expect(&model, &["--prompt", "", "--raw"], &["no_prompt (400)", "empty"]);
    let long = list(&vec![5; 2049]);
    expect(&model, &["--ids", &long], &["context_length (413)", "2049", "2048"]);
    expect(&model, &["--ids", "5,6", "--max-tokens", "2047"], &["context_length (413)", "max_tokens"]);
    let missing = demo().join("no-such-file.json").display().to_string();
    expect(&model, &["--messages", &missing], &["no-such-file.json"]);
}

#[test]
fn placeholders_and_media_must_match() {
    let (model, still) = (demo(), clip("one-shape.png"));
    expect(&model, &["--ids", "5,1010,6"], &["media_mismatch (400)", "placeholder"]);
    expect(&model, &["--prompt", "<|image_pad|>", "--image", &still], &["media_mismatch (400)", "image"]);
    expect(&model, &["--ids", "5,1010,6", "--image", &still], &["--ids", "image placeholders at 1"]);
    expect(&model, &["--ids", "5,6", "--image", &still], &["--ids: no placeholders for 1"]);
    let many = list(&[1010; 400]);
    expect(&model, &["--ids", &many, "--image", &still], &["more image placeholders than media"]);
    expect(&model, &["--prompt", "x", "--image", "gone.png"], &["media_missing (404)", "gone.png"]);
    let text = clip("expected.json");
    expect(&model, &["--prompt", "x", "--image", &text], &["media_type (415)"]);
}

#[test]
fn flags_that_contradict_each_other() {
    let (model, still) = (demo(), clip("one-shape.png"));
    let frames = format!("{still},{still}");
    expect(&model, &["--prompt", "x", "--ids", "1"], &["--ids"]);
    expect(&model, &["--max-tokens", "3"], &["--prompt"]);
    expect(&model, &["--prompt", "x", "--frames", &frames], &["--fps"]);
    let two = ["--prompt", "x", "--frames", &frames, "--fps", "1", "--fps", "2"];
    expect(&model, &two, &["2 --fps for 1 --frames"]);
    expect(&model, &["--prompt", "x", "--logprobs", "3"], &["--json"]);
    expect(&model, &["--prompt", "x", "--raw", "--image", &still], &["--raw"]);
    expect(&model, &["--prompt", "x", "--dtype", "int8"], &["f32", "bf16"]);
    expect(&model, &["--ids", "1,x"], &["--ids"]);
}

#[test]
fn checkpoints_that_are_not_what_they_say() {
    let ids = ["--ids", "5,6", "--max-tokens", "1"];
    let cut = spoiled(|dir| {
        let path = dir.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    });
    expect(cut.path(), &ids, &["model.safetensors", "bytes where the header asks for"]);
    let template = spoiled(|dir| std::fs::write(dir.join("chat_template.jinja"), "ok\n{% if %}").unwrap());
    expect(template.path(), &["--prompt", "x"], &["chat_template.jinja", "line 2"]);
    let refusing = spoiled(|dir| {
        std::fs::write(dir.join("chat_template.jinja"), "{{ raise_exception('only tools here') }}").unwrap();
    });
    expect(refusing.path(), &["--prompt", "x"], &["template (400)", "only tools here"]);
    let config = |from: &str, to: &str| {
        spoiled(|dir| {
            let path = dir.join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{from}");
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        })
    };
    for (from, to, words) in [
        ("\"Qwen3VLForConditionalGeneration\"", "\"LlamaForCausalLM\"", ["LlamaForCausalLM", "known:"]),
        ("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\"", ["yarn", "rope_type"]),
        (
            "\"architectures\"",
            "\"quantization_config\": {\"bits\": 4}, \"architectures\"",
            ["quantization_config", "not supported"],
        ),
        ("\"architectures\"", "\"archetypes\"", ["architectures", "missing"]),
    ] {
        expect(config(from, to).path(), &ids, &words);
    }
}

#[test]
fn a_device_that_is_not_there_is_said_to_be_missing() {
    let output = run(&demo(), &["--prompt", "x", "--device", "abacus"]).unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cpu, cuda"));
}
