//! Strictness of loading: every way in which a directory can disagree with itself is an error that names the place.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

use super::*;

const CONFIG: &str = r#"{"architectures": ["X"], "n": 3, "none": null, "text": {"rope_theta": 5e6}}"#;

fn write(dir: &Path, file: &str, tensors: &[(&str, &[usize])]) {
    let data = vec![0u8; 4096];
    let view = |shape: &[usize]| {
        TensorView::new(Dtype::F32, shape.to_vec(), &data[..4 * shape.iter().product::<usize>()]).unwrap()
    };
    let views: HashMap<&str, TensorView<'_>> = tensors.iter().map(|(name, shape)| (*name, view(shape))).collect();
    serialize_to_file(&views, None, &dir.join(file)).unwrap();
}

fn checkpoint(config: &str, tensors: &[(&str, &[usize])]) -> (tempfile::TempDir, Result<Checkpoint, ExecutorError>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    write(dir.path(), "model.safetensors", tensors);
    let opened = Checkpoint::open(dir.path());
    (dir, opened)
}

fn failure<T>(result: Result<T, ExecutorError>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn missing_misshapen_and_unused_tensors_are_named() {
    let (_dir, opened) = checkpoint(CONFIG, &[("a", &[2, 3]), ("b", &[4])]);
    let mut opened = opened.unwrap();
    let (_, weights) = opened.parts().unwrap();
    assert_eq!(failure(weights.take("c", &[1])), "tensor `c` is missing from the checkpoint");
    assert!(failure(weights.take("a", &[3, 2])).contains("tensor `a` has shape [2, 3], the config asks for [3, 2]"));
    assert_eq!(failure(opened.finish()), "1 tensors of the checkpoint were not used, first [\"b\"]");
}

#[test]
fn a_tensor_is_taken_once() {
    let (_dir, opened) = checkpoint(CONFIG, &[("a", &[2])]);
    let mut opened = opened.unwrap();
    let (_, weights) = opened.parts().unwrap();
    assert_eq!(weights.take("a", &[2]).unwrap().dims(), [2]);
    assert!(weights.take("a", &[2]).is_err());
    opened.finish().unwrap();
}

#[test]
fn shards_must_match_their_index() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    write(dir.path(), "one.safetensors", &[("a", &[2])]);
    write(dir.path(), "two.safetensors", &[("b", &[3])]);
    let index = |text: &str| std::fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
    index(r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#);
    let mut opened = Checkpoint::open(dir.path()).unwrap();
    let (_, weights) = opened.parts().unwrap();
    assert_eq!(weights.take("b", &[3]).unwrap().dims(), [3]);
    index(r#"{"weight_map": {"a": "two.safetensors", "b": "two.safetensors"}}"#);
    assert!(failure(Checkpoint::open(dir.path())).contains("tensor `a` is not in two.safetensors"));
    write(dir.path(), "two.safetensors", &[("b", &[3]), ("c", &[1])]);
    index(r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#);
    assert!(failure(Checkpoint::open(dir.path())).contains("tensor `c` is in a shard but not in the index"));
    index(r#"{"weight_map": {"a": "gone.safetensors"}}"#);
    assert!(failure(Checkpoint::open(dir.path())).contains("gone.safetensors"));
}

#[test]
fn a_file_that_is_cut_short_is_refused() {
    let (dir, opened) = checkpoint(CONFIG, &[("a", &[64])]);
    opened.unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for length in [0, 7, 20, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert!(failure(Checkpoint::open(dir.path())).contains("model.safetensors"), "{length} bytes were accepted");
    }
}

#[test]
fn the_hash_tells_weights_and_configs_apart() {
    let hash = |config: &str, shape: &[usize]| {
        let (_dir, opened) = checkpoint(config, &[("a", shape)]);
        opened.unwrap().weights_hash().to_string()
    };
    let first = hash(CONFIG, &[6]);
    assert_eq!(first, hash(CONFIG, &[6]));
    assert_eq!(first.len(), 32);
    assert_ne!(first, hash(CONFIG, &[2, 3]));
    assert_ne!(first, hash(&CONFIG.replace('3', "4"), &[6]));
}

#[test]
fn quantised_weights_are_refused() {
    for config in [
        r#"{"architectures": ["X"], "quantization_config": {"bits": 4}}"#,
        r#"{"architectures": ["X"], "text_config": {"quantization_config": {"bits": 4}}}"#,
    ] {
        assert!(failure(checkpoint(config, &[]).1).contains("quantised"));
    }
    assert!(failure(checkpoint("{}", &[]).1).contains("architectures"));
}

#[test]
fn fields_fall_back_to_defaults_and_refuse_other_kinds() {
    let value: Value = serde_json::from_str(CONFIG).unwrap();
    let fields = Fields::root(&value).unwrap();
    assert_eq!(fields.size("n", 9).unwrap(), 3);
    assert_eq!(fields.size("none", 9).unwrap(), 9);
    assert_eq!(fields.size("absent", 9).unwrap(), 9);
    assert!(failure(fields.size("text", 9)).contains("`text` must be an integer"));
    let text = fields.object("text").unwrap();
    assert!(failure(text.flag("rope_theta", true)).contains("`text.rope_theta`"));
    assert!(failure(fields.size("absent", 0)).contains(">= 1"));
}

fn rope(text: &str) -> Result<RopeConfig, ExecutorError> {
    let value: Value = serde_json::from_str(text).unwrap();
    RopeConfig::read(&Fields::root(&value)?, "default", 500.0)
}

#[test]
fn rope_is_read_in_both_spellings() {
    let theta = |text| rope(text).unwrap().theta;
    assert_eq!(theta("{}"), 500.0);
    assert_eq!(theta(r#"{"rope_theta": 5000000, "rope_scaling": null}"#), 5e6);
    assert_eq!(theta(r#"{"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "rope_theta": 9}"#), 7.0);
    let old = r#"{"rope_theta": 9, "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}}"#;
    assert_eq!(rope(old).unwrap(), RopeConfig { theta: 9.0, mrope_section: Some(vec![24, 20, 20]) });
}

#[test]
fn rope_of_another_type_is_refused() {
    for text in [
        r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}"#,
        r#"{"rope_scaling": {"type": "linear", "factor": 4.0}}"#,
        r#"{"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}"#,
        r#"{"rope_parameters": {"mrope_interleaved": false}}"#,
    ] {
        assert!(matches!(rope(text), Err(ExecutorError::Unsupported(_))), "{text} was accepted");
    }
    assert!(failure(rope(r#"{"rope_theta": 0}"#)).contains("rope_theta"));
    assert!(failure(rope(r#"{"rope_parameters": {"mrope_section": [1, 2]}}"#)).contains("mrope_section"));
}
