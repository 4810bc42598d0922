"""The programs that cpu_speed.py compares with, each in a process of its own under its own Python.

    python cpu_peers.py transformers FOLDER sdpa|eager
    python cpu_peers.py mistralrs FOLDER BF16|F16|F32

The model is loaded once. Then each line read from stdin, `{"ids": [...], "tokens": N}`, is answered by one line on stdout:
seconds of the prompt's pass (first token included), seconds of each later token, and the tokens if they are known.
"""

import json
import resource
import sys
import time


def transformers(folder, attention):
    """The loop of `generate` without its bookkeeping: one forward a token, greedy, over the library's own cache."""
    import torch
    import transformers as library
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention).eval()

    @torch.inference_mode()
    def run(ids, tokens):
        started = time.perf_counter()
        out = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        drawn = [token.item()]
        prefilled = time.perf_counter()
        while len(drawn) < tokens:
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            drawn.append(token.item())
        decoded = time.perf_counter() - prefilled
        return prefilled - started, decoded / max(1, tokens - 1), drawn

    about = {"transformers": library.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return about, run


def mistralrs(folder, dtype):
    """The Python wheel; it reports the seconds of the prompt and of the completion itself."""
    from importlib.metadata import version

    from mistralrs import CompletionRequest, ModelDType, Runner, Which

    which = Which.Plain(model_id=folder, dtype=getattr(ModelDType, dtype))
    runner = Runner(which=which, prefix_cache_n=0, max_seqs=1)

    def run(ids, tokens):
        # Token ids of the benchmark's tokenizer are bytes.
        request = CompletionRequest(
            prompt=bytes(ids).decode("ascii"), model="default", max_tokens=tokens, temperature=0.0, ignore_eos=True
        )
        usage = runner.send_completion_request(request).usage
        if (usage.prompt_tokens, usage.completion_tokens) != (len(ids), tokens):
            sys.exit(f"mistralrs counted {usage.prompt_tokens} + {usage.completion_tokens} tokens")
        return usage.total_prompt_time_sec, usage.total_completion_time_sec / max(1, tokens - 1), None

    return {"mistralrs": version("mistralrs")}, run


def main():
    kind, folder, variant = sys.argv[1:]
    started = time.perf_counter()
    about, run = {"transformers": transformers, "mistralrs": mistralrs}[kind](folder, variant)
    about["load_s"] = time.perf_counter() - started
    # Libraries print to stdout too: answers are the lines that start with this mark.
    print("answer " + json.dumps(about), flush=True)
    for line in sys.stdin:
        prefill, token, drawn = run(**json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"prefill_s": prefill, "token_s": token, "tokens": drawn, "peak_bytes": peak}
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
