//! Sizes of the real models: built from their official configs without a byte of weights, each must ask for exactly as many
//! parameters as its published checkpoint holds. Names and shapes of every layer kind are checked on the way by the families'
//! fixtures; here it is the defaults and the official values.

use candle_core::{DType, Device, Tensor};
use millrace_executor::ExecutorError;
use millrace_executor::checkpoint::{Fields, Loader, TensorSource};
use millrace_executor::models::{self, ModelSpec};
use millrace_kernels::CpuBackend;
use serde_json::{Value, json};

use crate::mutant_backend::{Fault, MutantBackend};

/// Gives every tensor asked for as bytes that nobody touches, and counts.
struct Counter(u64);

impl TensorSource for Counter {
    fn has(&self, _name: &str) -> bool {
        false
    }

    fn take(&mut self, _name: &str, shape: &[usize]) -> Result<Tensor, ExecutorError> {
        self.0 += shape.iter().product::<usize>() as u64;
        Ok(Tensor::zeros(shape, DType::U8, &Device::Cpu).unwrap())
    }

    fn leave_out(&mut self, _prefix: &str) -> usize {
        0
    }
}

/// Parameters of the config's model with `layers` decoder layers.
fn count(config: &Value, layers: u64) -> (u64, ModelSpec) {
    let mut config = config.clone();
    let text = if config["text_config"].is_object() { &mut config["text_config"] } else { &mut config };
    text["num_hidden_layers"] = layers.into();
    let backend = MutantBackend::new(CpuBackend::new(DType::F32).unwrap(), Fault::Weightless);
    let mut counter = Counter(0);
    let name = config["architectures"][0].as_str().unwrap().to_string();
    let fields = Fields::root(&config).unwrap();
    let model = models::build(&name, &fields, &mut Loader::new(&mut counter, &backend)).unwrap();
    (counter.0, model.spec().clone())
}

/// Total over `layers` layers, from the difference that one layer makes behind the first few.
fn total(config: &Value, few: u64, layers: u64) -> u64 {
    let (low, high) = (count(config, few).0, count(config, few + 1).0);
    low + (layers - few) * (high - low)
}

#[test]
fn qwen3_4b() {
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_size": 2560, "intermediate_size": 9728,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 262_144, "rope_theta": 5_000_000,
        "rope_scaling": null, "sliding_window": null, "tie_word_embeddings": true, "vocab_size": 151_936,
    });
    assert_eq!(total(&config, 1, 36), 4_022_468_096);
    let spec = count(&config, 1).1;
    assert_eq!((spec.vocab, spec.max_tokens, 36 * 2 * spec.kv_elements), (151_936, 262_144, 147_456));
}

#[test]
fn qwen3_coder_30b() {
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "hidden_size": 2048, "intermediate_size": 5472,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "rope_theta": 10_000_000, "tie_word_embeddings": false, "vocab_size": 151_936,
    });
    assert_eq!(total(&config, 1, 48), 30_532_122_624);
    assert_eq!(48 * 2 * count(&config, 1).1.kv_elements, 98_304);
}

#[test]
fn glm_4_7_flash() {
    let config = json!({
        "architectures": ["Glm4MoeLiteForCausalLM"], "hidden_size": 2048, "intermediate_size": 10_240,
        "moe_intermediate_size": 1536, "num_attention_heads": 20, "num_key_value_heads": 20, "n_group": 1, "topk_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8, "num_experts_per_tok": 4,
        "partial_rotary_factor": 1.0, "rope_scaling": null, "rope_theta": 1_000_000, "q_lora_rank": 768,
        "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "vocab_size": 154_880,
        "num_nextn_predict_layers": 1, "tie_word_embeddings": false,
    });
    assert_eq!(total(&config, 2, 47), 29_943_393_920);
    assert_eq!(47 * 2 * count(&config, 1).1.kv_elements, 54_144);
}

#[test]
fn qwen3_vl_2b() {
    let config = json!({
        "architectures": ["Qwen3VLForConditionalGeneration"], "tie_word_embeddings": true,
        "text_config": {
            "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
            "num_key_value_heads": 8, "rope_theta": 5_000_000, "vocab_size": 151_936,
            "rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"},
        },
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
            "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "model_type": "qwen3_vl",
        },
    });
    assert_eq!(total(&config, 3, 28), 2_127_532_032);
}

#[test]
fn an_unknown_architecture_is_refused_by_name() {
    let backend = CpuBackend::new(DType::F32).unwrap();
    let config = json!({"architectures": ["LlamaForCausalLM"]});
    let fields = Fields::root(&config).unwrap();
    let error = models::build("LlamaForCausalLM", &fields, &mut Loader::new(&mut Counter(0), &backend)).err().unwrap();
    assert!(matches!(error, ExecutorError::Unsupported(_)));
    assert!(error.to_string().contains("LlamaForCausalLM") && error.to_string().contains("Qwen3ForCausalLM"));
}
