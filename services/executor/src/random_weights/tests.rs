//! The official layout: what is written has the tensors that transformers' `save_pretrained` wrote for the same config.

use std::collections::BTreeMap;

use ::safetensors::SafeTensors;

use super::*;

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/fixtures").join(name)
}

fn shapes(dir: &Path) -> BTreeMap<String, (String, Vec<usize>)> {
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let entry = |(name, view): (String, ::safetensors::tensor::TensorView<'_>)| {
        (name, (format!("{:?}", view.dtype()), view.shape().to_vec()))
    };
    tensors.tensors().into_iter().map(entry).collect()
}

#[test]
fn every_family_has_the_tensors_of_transformers() {
    for name in ["qwen3_vl", "qwen3", "qwen3_moe", "glm4_moe_lite", "qwen3_moe_one"] {
        let dir = tempfile::tempdir().unwrap();
        let summary = write_random(&fixture(name), dir.path(), &RandomOptions { layers: None, seed: 5 }).unwrap();
        assert_eq!(shapes(dir.path()), shapes(&fixture(name)), "{name}");
        assert_eq!(summary.tensors, shapes(dir.path()).len());
        assert!(summary.bytes >= 2 * summary.parameters);
    }
}

#[test]
fn layers_are_cut_and_the_seed_decides() {
    let write = |layers, seed| {
        let dir = tempfile::tempdir().unwrap();
        write_random(&fixture("qwen3_moe"), dir.path(), &RandomOptions { layers, seed }).unwrap();
        let checkpoint = crate::checkpoint::Checkpoint::open(dir.path()).unwrap();
        let hash = checkpoint.weights_hash().to_string();
        models::load(checkpoint, &CpuBackend::new(DType::F32).unwrap()).unwrap();
        (shapes(dir.path()).len(), hash)
    };
    assert!(write(Some(1), 1).0 < write(Some(2), 1).0);
    assert_eq!(write(Some(1), 1), write(Some(1), 1));
    assert_ne!(write(Some(1), 1).1, write(Some(1), 2).1);
}

#[test]
fn values_are_normal_with_the_official_deviation() {
    let values: Vec<f32> = tensor(3, "x.weight", &[100, 100])
        .unwrap()
        .to_dtype(DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    let mean = values.iter().sum::<f32>() / 1e4;
    let deviation = (values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 1e4).sqrt();
    // Five standard errors of 10,000 draws.
    assert!(mean.abs() < 0.001 && (deviation - 0.02).abs() < 0.0008, "{mean} {deviation}");
    let beyond = values.iter().filter(|x| x.abs() > 0.04).count();
    assert!((340..570).contains(&beyond), "{beyond} beyond two deviations, expected 455");
}
