//! The comparison can fail: each fault that a port of this model is likely to have is built in on purpose and must be seen.

use candle_core::DType;
use millrace_executor::checkpoint::Checkpoint;
use millrace_executor::layers::vision::{PatchGrid, VisionFeatures};
use millrace_executor::models::{Model, ModelSpec};
use millrace_executor::positions::Positions;
use millrace_executor::step_batch::StepBatch;
use millrace_executor::{Dtype, ExecutorError};
use millrace_kernels::{Backend, CpuBackend};
use millrace_protocol::ready::MediaItem;

use crate::exact::TOLERANCE;
use crate::fixture::Family;
use crate::mutant_backend::{Fault, MutantBackend};

/// A fault of the model rather than of an op.
#[derive(Debug, Clone, Copy, PartialEq)]
enum ModelFault {
    None,
    DeepstackSwapped,
    NoRopeDelta,
}

struct MutantModel<B: Backend> {
    inner: Box<dyn Model<B>>,
    fault: ModelFault,
}

impl<B: Backend> Model<B> for MutantModel<B> {
    fn spec(&self) -> &ModelSpec {
        self.inner.spec()
    }

    fn kv_caches(&self, backend: &B, blocks: usize, block_tokens: usize) -> Result<Vec<B::KvCache>, ExecutorError> {
        self.inner.kv_caches(backend, blocks, block_tokens)
    }

    fn positions(&self, media: &[MediaItem]) -> Positions {
        let positions = self.inner.positions(media);
        if self.fault == ModelFault::NoRopeDelta { positions.with_delta(0) } else { positions }
    }

    fn encode(&self, backend: &B, items: &[PatchGrid]) -> Result<Vec<VisionFeatures<B>>, ExecutorError> {
        let mut features = self.inner.encode(backend, items)?;
        if self.fault == ModelFault::DeepstackSwapped {
            features.iter_mut().for_each(|item| item.deepstack.reverse());
        }
        Ok(features)
    }

    fn forward(
        &mut self,
        backend: &B,
        batch: &StepBatch<'_, B>,
        caches: &mut [B::KvCache],
    ) -> Result<B::Tensor, ExecutorError> {
        self.inner.forward(backend, batch, caches)
    }
}

/// Largest difference in tolerances over the rows of `case`.
fn difference(name: &str, case: &str, op: Fault, model: ModelFault) -> f32 {
    let mut family = Family::open(name);
    let backend = MutantBackend::new(CpuBackend::new(DType::F32).unwrap(), op);
    let mut engine = family.engine_on(backend, Dtype::F32, |inner| Box::new(MutantModel { inner, fault: model }));
    let request = family.case(case).forced();
    let result = family.run(&mut engine, &[request], &Default::default()).remove(0);
    let case = family.case(case);
    let difference = case.compare(&result).max / (TOLERANCE * case.spread);
    println!("{} {op:?} {model:?}: {difference} tolerances", case.name);
    difference
}

#[test]
fn without_a_fault_the_mutant_passes() {
    assert!(difference("qwen3_vl", "mixed", Fault::None, ModelFault::None) <= 1.0);
}

#[test]
fn every_fault_is_seen() {
    for op in [
        Fault::GeluOfBlocks,
        Fault::GeluOfMergers,
        Fault::NoPositionEmbeddings,
        Fault::PositionEmbeddingsShifted,
        Fault::NoQkNorm,
        Fault::NoVisionRotation,
        Fault::SegmentsJoined,
    ] {
        assert!(difference("qwen3_vl", "mixed", op, ModelFault::None) > 10.0, "{op:?} was not seen");
    }
    for model in [ModelFault::DeepstackSwapped, ModelFault::NoRopeDelta] {
        assert!(difference("qwen3_vl", "mixed", Fault::None, model) > 10.0, "{model:?} was not seen");
    }
}

#[test]
fn faults_of_the_other_families_are_seen() {
    for (name, fault) in [
        ("qwen3", Fault::NoQkNorm),
        ("qwen3_moe", Fault::NoQkNorm),
        ("qwen3_moe", Fault::NoTopkNorm),
        ("glm4_moe_lite", Fault::NoTopkNorm),
        ("glm4_moe_lite", Fault::NoRouterBias),
        ("glm4_moe_lite", Fault::NoLatentNorm),
        ("qwen3_moe_one", Fault::NoQkNorm),
        ("glm4_moe_lite_one", Fault::NoRouterBias),
        ("glm4_moe_lite_one", Fault::NoLatentNorm),
    ] {
        assert!(difference(name, "long", Fault::None, ModelFault::None) <= 1.0);
        assert!(difference(name, "long", fault, ModelFault::None) > 10.0, "{name}: {fault:?} was not seen");
    }
}

#[test]
fn a_config_with_other_deepstack_blocks_is_seen() {
    let mut family = Family::open("qwen3_vl");
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(family.dir.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["vision_config"]["deepstack_visual_indexes"] = serde_json::json!([2, 0]);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(family.dir.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    assert_ne!(
        Checkpoint::open(dir.path()).unwrap().weights_hash(),
        Checkpoint::open(&family.dir).unwrap().weights_hash()
    );
    family.dir = dir.path().to_path_buf();
    let mut engine = family.engine(Dtype::F32);
    let request = family.case("wide").forced();
    let result = family.run(&mut engine, &[request], &Default::default()).remove(0);
    let case = family.case("wide");
    assert!(case.compare(&result).max > 10.0 * TOLERANCE * case.spread);
}

/// The tokens before a clip's group say when it was (preprocessing's own goldens compare those tokens; here it is that the model's
/// answer depends on them).
#[test]
fn wrong_times_are_seen() {
    let mut family = Family::open("qwen3_vl");
    let mut engine = family.engine(Dtype::F32);
    let mut request = family.case("clip").forced();
    let starts: Vec<usize> = request.media.iter().map(|item| item.start as usize).collect();
    let behind = starts[2] + request.media[2].tokens as usize;
    let right = family.run(&mut engine, std::slice::from_ref(&request), &Default::default()).remove(0);
    // Three tokens of text stand before each group's opening: those of the first and of the second group, swapped.
    for n in 2..=4 {
        request.prompt.swap(starts[0] - n, starts[1] - n);
    }
    let wrong = family.run(&mut engine, &[request], &Default::default()).remove(0);
    let case = family.case("clip");
    let worst = |result: &millrace_executor::generate::Generated| {
        let rows = result.logits[behind..].iter().zip(&case.logits[behind..]);
        rows.flat_map(|(row, golden)| row.logits.iter().zip(golden)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    let tolerance = TOLERANCE * case.spread;
    assert!(worst(&right) <= tolerance);
    assert!(worst(&wrong) > 10.0 * tolerance, "{} tolerances", worst(&wrong) / tolerance);
}
