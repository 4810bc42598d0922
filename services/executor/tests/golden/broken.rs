//! Checkpoints that are not what their config says, for every family: each tensor missing, misshapen or beyond what the model takes is
//! an error that names it. And the layouts that are allowed beside the usual one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::DType;
use millrace_executor::checkpoint::Checkpoint;
use millrace_executor::generate::Generated;
use millrace_executor::{Dtype, ExecutorError, models};
use millrace_kernels::CpuBackend;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as Stored, TensorView};

use crate::fixture::Family;

const FIXTURES: [&str; 6] = ["qwen3", "qwen3_moe", "glm4_moe_lite", "qwen3_vl", "qwen3_moe_one", "glm4_moe_lite_one"];

#[derive(Clone)]
struct Stone {
    dtype: Stored,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

type Tensors = BTreeMap<String, Stone>;

fn read(dir: &Path) -> Tensors {
    let file = std::fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let stone =
        |view: TensorView<'_>| Stone { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
    tensors.tensors().into_iter().map(|(name, view)| (name, stone(view))).collect()
}

/// A copy of `family` with these tensors.
fn write(family: &Family, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(family.dir.join("config.json"), dir.path().join("config.json")).unwrap();
    let views = tensors
        .iter()
        .map(|(name, stone)| (name, TensorView::new(stone.dtype, stone.shape.clone(), &stone.bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    dir
}

fn load(dir: &Path) -> Result<(), ExecutorError> {
    models::load(Checkpoint::open(dir)?, &CpuBackend::new(DType::F32).unwrap()).map(drop)
}

/// Tensors that the model takes: all but a draft layer's.
fn taken(name: &str, tensor: &str) -> bool {
    name != "glm4_moe_lite_one" || !tensor.starts_with("model.layers.4.")
}

#[test]
fn every_missing_tensor_is_named() {
    for name in FIXTURES {
        let family = Family::open(name);
        let tensors = read(&family.dir);
        for gone in tensors.keys().filter(|tensor| taken(name, tensor)) {
            let mut left = tensors.clone();
            left.remove(gone);
            let error = load(write(&family, &left).path()).unwrap_err();
            assert!(matches!(&error, ExecutorError::MissingTensor(named) if named == gone), "{name} {gone}: {error}");
        }
    }
}

#[test]
fn every_misshapen_tensor_is_named() {
    for name in FIXTURES {
        let family = Family::open(name);
        let tensors = read(&family.dir);
        for wrong in tensors.keys().filter(|tensor| taken(name, tensor)) {
            let mut changed = tensors.clone();
            // Twice as long: the shapes in front stay.
            let stone = changed.get_mut(wrong).unwrap();
            *stone.shape.last_mut().unwrap() *= 2;
            stone.bytes = stone.bytes.repeat(2);
            let error = load(write(&family, &changed).path()).unwrap_err();
            assert!(
                matches!(&error, ExecutorError::TensorShape { name: named, .. } if named == wrong),
                "{name} {wrong}: {error}"
            );
        }
    }
}

#[test]
fn a_tensor_that_no_model_takes_is_named() {
    for name in FIXTURES {
        let family = Family::open(name);
        let mut tensors = read(&family.dir);
        let extra = "model.layers.1.self_attn.sinks";
        tensors.insert(extra.into(), Stone { dtype: Stored::F32, shape: vec![1], bytes: vec![0; 4] });
        let error = load(write(&family, &tensors).path()).unwrap_err();
        assert!(
            matches!(&error, ExecutorError::UnusedTensors { count: 1, names } if names == &[extra]),
            "{name}: {error}"
        );
    }
}

fn answers(family: &mut Family) -> Vec<Generated> {
    let mut engine = family.engine(Dtype::F32);
    let request = family.case("short").greedy();
    family.run(&mut engine, &[request], &Default::default())
}

/// transformers 5 holds experts fused and may write them so: gate rows, then up rows, for each expert.
#[test]
fn fused_experts_are_the_same_experts() {
    for name in ["qwen3_moe", "glm4_moe_lite", "qwen3_moe_one", "glm4_moe_lite_one"] {
        let mut family = Family::open(name);
        let apart = answers(&mut family);
        let mut fused = Tensors::new();
        // In the order of the experts' numbers, which is not that of their names.
        let mut stacks: BTreeMap<String, BTreeMap<(usize, usize), Stone>> = BTreeMap::new();
        for (tensor, stone) in read(&family.dir) {
            let Some((block, rest)) = tensor.split_once(".experts.") else {
                fused.insert(tensor, stone);
                continue;
            };
            let [expert, part, _] = rest.split('.').collect::<Vec<_>>()[..] else { panic!("{tensor}") };
            let (stack, place) = match part {
                "gate_proj" => ("gate_up_proj", 0),
                "up_proj" => ("gate_up_proj", 1),
                _ => ("down_proj", 0),
            };
            let stack = stacks.entry(format!("{block}.experts.{stack}")).or_default();
            stack.insert((expert.parse().unwrap(), place), stone);
        }
        assert!(!stacks.is_empty());
        for (tensor, parts) in stacks {
            let experts = parts.keys().map(|(expert, _)| expert).max().unwrap() + 1;
            let first = parts.values().next().unwrap();
            let rows = parts.len() / experts * first.shape[0];
            let (dtype, shape) = (first.dtype, vec![experts, rows, first.shape[1]]);
            fused.insert(
                tensor,
                Stone { dtype, shape, bytes: parts.into_values().flat_map(|part| part.bytes).collect() },
            );
        }
        let dir = write(&family, &fused);
        family.dir = dir.path().to_path_buf();
        assert!(answers(&mut family) == apart, "{name}");
    }
}

/// Collects the texts of log lines.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl tracing::field::Visit for Lines {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0.lock().unwrap().push(format!("{field}={value:?}"));
    }
}

impl tracing::Subscriber for Lines {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut self.clone());
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_draft_layer_is_recognised_and_loaded_on_demand() {
    let family = Family::open("glm4_moe_lite_one");
    let backend = CpuBackend::new(DType::F32).unwrap();
    let lines = Lines::default();
    tracing::subscriber::with_default(lines.clone(), || load(&family.dir).unwrap());
    let said = lines.0.lock().unwrap().join(" ");
    assert!(said.contains("draft (MTP) layer recognised") && said.contains("model.layers.4"), "{said}");

    let draft = |dir: &Path| models::load_draft(Checkpoint::open(dir).unwrap(), &backend);
    assert!(draft(&family.dir).unwrap().is_some());
    for name in ["glm4_moe_lite", "qwen3"] {
        assert!(draft(&Family::open(name).dir).unwrap().is_none());
    }
    let tensors = read(&family.dir);
    for part in ["enorm.weight", "eh_proj.weight", "self_attn.kv_b_proj.weight", "embed_tokens.weight"] {
        let mut left = tensors.clone();
        let gone = format!("model.layers.4.{part}");
        left.remove(&gone).unwrap();
        let error = draft(write(&family, &left).path()).err().unwrap();
        assert!(matches!(&error, ExecutorError::MissingTensor(named) if *named == gone), "{error}");
    }
    let mut other = tensors;
    other.get_mut("model.layers.4.shared_head.head.weight").unwrap().bytes[3] ^= 1;
    let error = draft(write(&family, &other).path()).err().unwrap();
    assert!(error.to_string().contains("model.layers.4") && error.to_string().contains("lm_head.weight"), "{error}");
}
