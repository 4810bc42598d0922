"""What transformers computes: greedy answers with its cache, logits for every position, position ids, bf16 errors."""

import torch


def logits_everywhere(model, inputs, prompt_tokens):
    """Prompt in one pass, the answer token by token over the cache, as `generate` runs them: [tokens, V] in f32."""
    ids = inputs["input_ids"]
    prompt = dict(inputs, input_ids=ids[:, :prompt_tokens], attention_mask=inputs["attention_mask"][:, :prompt_tokens])
    if "mm_token_type_ids" in inputs:
        prompt["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :prompt_tokens]
    forget_positions(model)
    out = model(**prompt, use_cache=True)
    rows = [out.logits[0].float()]
    for n in range(prompt_tokens, ids.shape[1]):
        # Without a mask: given one, Qwen3-VL counts positions from it, one for each token of the whole sequence.
        out = model(input_ids=ids[:, n : n + 1], past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0].float())
    return torch.cat(rows)


def forget_positions(model):
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None


def greedy(model, inputs, steps):
    forget_positions(model)
    out = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def positions(model, inputs):
    """Three axes of the prompt and what the answer's positions are shifted by."""
    if "mm_token_type_ids" not in inputs or not ("image_grid_thw" in inputs or "video_grid_thw" in inputs):
        return {}
    grids = {k: inputs[k].clone() for k in ("image_grid_thw", "video_grid_thw") if k in inputs}
    axes, delta = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
    return dict(positions=axes[:, 0].T.tolist(), rope_delta=int(delta))


def bf16_error(exact, low):
    """How far the same model in bf16 is from f32; the spread is the standard deviation over the vocabulary."""
    difference = (exact - low).abs()
    return dict(
        spread=float(exact.std(dim=-1).mean()),
        bf16_max_error=float(difference.max()),
        bf16_high_error=high(difference),
        bf16_rms_error=float(difference.square().mean().sqrt()),
    )


def high(difference):
    """The error that one logit in a thousand exceeds: the largest of all is one draw and says little."""
    ordered = difference.flatten().sort(descending=True).values
    return float(ordered[ordered.numel() // 1000])
