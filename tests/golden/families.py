"""Tiny configs, one a family, with sizes that no tile divides; and how their checkpoints are written.

Expert sizes are multiples of 8 only because torch's grouped GEMM asks for rows of 16 bytes.
"""

import json

import safetensors.torch
import torch
import transformers as tf

VOCAB = 331
IMAGE, VIDEO, VISION_START, VISION_END = 321, 322, 323, 324


def qwen3_vl():
    config = tf.Qwen3VLConfig(
        text_config=dict(
            vocab_size=VOCAB, hidden_size=84, intermediate_size=124, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=28, max_position_embeddings=512, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=5000.0, mrope_interleaved=True, mrope_section=[5, 4, 5]),
        ),
        vision_config=dict(
            depth=4, hidden_size=60, num_heads=3, intermediate_size=92, patch_size=4, temporal_patch_size=2,
            spatial_merge_size=2, out_hidden_size=84, num_position_embeddings=49, deepstack_visual_indexes=[0, 2],
            in_channels=3,
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    return config, tf.Qwen3VLForConditionalGeneration


def qwen3():
    config = tf.Qwen3Config(
        vocab_size=VOCAB, hidden_size=84, intermediate_size=124, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=36, max_position_embeddings=512, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=7000.0), tie_word_embeddings=False,
    )
    return config, tf.Qwen3ForCausalLM


def qwen3_moe():
    config = tf.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=88, intermediate_size=68, moe_intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=28, num_experts=7, num_experts_per_tok=3,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1], max_position_embeddings=512, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False,
    )
    return config, tf.Qwen3MoeForCausalLM


def glm4_moe_lite():
    config = tf.Glm4MoeLiteConfig(
        vocab_size=VOCAB, hidden_size=88, intermediate_size=124, moe_intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, q_lora_rank=52, kv_lora_rank=40, qk_nope_head_dim=20,
        qk_rope_head_dim=12, v_head_dim=28, n_routed_experts=7, n_shared_experts=1, num_experts_per_tok=3,
        routed_scaling_factor=1.8, norm_topk_prob=True, max_position_embeddings=512, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=9000.0), tie_word_embeddings=False,
    )
    return config, tf.Glm4MoeLiteForCausalLM


def qwen3_moe_one():
    """One expert a token, weights as they come, dense layers on both sides of each sparse one, a tied head."""
    config = tf.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=72, intermediate_size=60, moe_intermediate_size=24, num_hidden_layers=5,
        num_attention_heads=5, num_key_value_heads=1, head_dim=20, num_experts=5, num_experts_per_tok=1,
        norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[], max_position_embeddings=512, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=20000.0), tie_word_embeddings=True,
    )
    return config, tf.Qwen3MoeForCausalLM


def glm4_moe_lite_one():
    """One expert a token out of the best of two groups, two shared ones, dense layers between sparse ones, queries without a
    latent of their own, and a draft (MTP) layer behind the last, which transformers leaves out."""
    config = tf.Glm4MoeLiteConfig(
        vocab_size=VOCAB, hidden_size=80, intermediate_size=108, moe_intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, q_lora_rank=None, kv_lora_rank=36, qk_nope_head_dim=12,
        qk_rope_head_dim=20, v_head_dim=20, n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=1, n_group=2,
        topk_group=1, routed_scaling_factor=1.3, norm_topk_prob=False, max_position_embeddings=512, rms_norm_eps=1e-5,
        mlp_layer_types=["sparse", "dense", "sparse", "dense"],
        rope_parameters=dict(rope_type="default", rope_theta=9000.0), tie_word_embeddings=False,
    )
    return config, tf.Glm4MoeLiteForCausalLM


FAMILIES = dict(
    qwen3_vl=qwen3_vl, qwen3=qwen3, qwen3_moe=qwen3_moe, glm4_moe_lite=glm4_moe_lite, qwen3_moe_one=qwen3_moe_one,
    glm4_moe_lite_one=glm4_moe_lite_one,
)

# Fixtures whose checkpoint holds a draft layer as the official one does.
DRAFTED = {"glm4_moe_lite_one"}


def scramble(model):
    """Every tensor matters: norms away from 1, biases away from 0, matrices wide enough for a healthy spread of logits.
    Matrices hold values of bf16, so that the rounded model has the same weights."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "e_score_correction_bias" in name:
            value = 0.2 * noise
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif "pos_embed" in name:
            value = 0.7 * noise
        elif "embed_tokens" in name:
            value = 0.3 * noise
        else:
            # What is added to the residual stream is wide, so that answers move on instead of repeating one token.
            gain = 4.0 if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")) else 1.1
            value = gain * noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value.to(torch.bfloat16).float())
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def save(tensors, path):
    safetensors.torch.save_file(dict(sorted(tensors.items())), path)


def draft_layer(tensors, layers, hidden):
    """Tensors of the layer behind the last: a copy of a sparse layer, what joins the two inputs, and copies of both tables."""
    generator = torch.Generator().manual_seed(11)
    at, source = f"model.layers.{layers}.", f"model.layers.{layers - 2}."
    extra = {at + name.removeprefix(source): t.clone() for name, t in tensors.items() if name.startswith(source)}
    for name in ("enorm", "hnorm", "shared_head.norm"):
        extra[f"{at}{name}.weight"] = 1 + 0.3 * torch.randn(hidden, generator=generator)
    extra[at + "eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) / (2 * hidden) ** 0.5
    extra[at + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    extra[at + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return extra


def write_checkpoint(name, folder, config, model_class):
    config._attn_implementation = "sdpa"
    model = model_class(config).float()
    scramble(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    if name in DRAFTED:
        tensors |= draft_layer(tensors, config.num_hidden_layers, config.hidden_size)
    # Matrices hold bf16 values already: half the bytes, nothing lost. GLM's router bias stays f32, as on disk.
    save({k: v if "e_score_correction_bias" in k else v.to(torch.bfloat16) for k, v in tensors.items()}, path)
    text = json.loads((folder / "config.json").read_text())
    if name in DRAFTED:
        text["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
