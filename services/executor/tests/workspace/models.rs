//! Models of the official sizes whose weights have shapes only.

use candle_core::{DType, Device, Tensor};
use millrace_executor::ExecutorError;
use millrace_executor::checkpoint::{Fields, Loader, TensorSource};
use millrace_executor::models::{self, Model};
use serde_json::{Value, json};

use crate::counting::Counting;

/// Zeros of one byte an element: pages that nobody touches take no memory.
struct Shapes;

impl TensorSource for Shapes {
    fn has(&self, _: &str) -> bool {
        false
    }
    fn take(&mut self, _: &str, shape: &[usize]) -> Result<Tensor, ExecutorError> {
        Ok(Tensor::zeros(shape, DType::U8, &Device::Cpu).unwrap())
    }
    fn take_stacked(&mut self, parts: &[(String, usize)], columns: usize) -> Result<Tensor, ExecutorError> {
        self.take("", &[parts.iter().map(|(_, rows)| rows).sum(), columns])
    }
    fn leave_out(&mut self, _: &str) -> usize {
        0
    }
}

pub fn build(config: &Value, device: &Counting) -> Result<Box<dyn Model<Counting>>, ExecutorError> {
    let fields = Fields::root(config)?;
    let architecture = config["architectures"][0].as_str().unwrap();
    models::build(architecture, &fields, &mut Loader::new(&mut Shapes, device))
}

/// Qwen3-4B-Instruct-2507's sizes.
pub fn qwen3_4b() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262_144, "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 5_000_000,
        "tie_word_embeddings": true, "vocab_size": 151_936,
    })
}

/// Qwen3-VL-2B-Instruct's sizes.
pub fn qwen3_vl_2b() -> Value {
    json!({
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": true,
        "text_config": {
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
            "max_position_embeddings": 262_144, "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 5_000_000, "vocab_size": 151_936,
            "rope_scaling": { "mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default" },
        },
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
            "in_channels": 3, "intermediate_size": 4096, "num_heads": 16, "num_position_embeddings": 2304,
            "out_hidden_size": 2048, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    })
}
