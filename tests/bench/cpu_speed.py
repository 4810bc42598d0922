"""Speed on the CPU: Millrace, transformers and mistralrs on one random checkpoint of Qwen3-0.6B's shape, bf16.

    python3 tests/bench/cpu_speed.py --millrace target/release/millrace \\
        --transformers VENV/bin/python --mistralrs VENV/bin/python --name MACHINE [--rounds 9] [--folder DIR]

Programs take turns, one at a time, because a shared machine's speed changes from minute to minute: only figures of one run
may be compared, as ratios of medians. Each round has its own prompt of 512 tokens. Writes
tests/bench/results/cpu-speed-NAME.json; tests/bench/readme.py makes the README's table of it.

Millrace starts anew and loads the model in each round; the others load once and are warm. What is timed is the prompt's pass
up to the first token, and the mean of the tokens behind it. Peak memory is that of the whole process.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS = 512
# Tokens of an answer; fewer for mistralrs, whose bf16 takes half a second for each.
TOKENS = {"millrace": 33, "transformers": 33, "mistralrs": 9}
VOCAB = 151_936
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": VOCAB - 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40_960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}


def byte_characters():
    """The printable character that byte-level tokenizers write for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_model(millrace, folder):
    """A config, a tokenizer whose ids below 256 are bytes, and random weights. Returns the bytes of the weights."""
    source, model = folder / "config", folder / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG, indent=1))
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary |= {f"<{token}>": token for token in range(256, VOCAB - 1)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"id": VOCAB - 1, "content": "<end>", "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": template}
    (source / "tokenizer_config.json").write_text(json.dumps(words))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCAB - 1}))
    subprocess.run([millrace, "random-weights", "--config", source, "--out", model, "--seed", "1"], check=True)
    return model, sum(path.stat().st_size for path in model.glob("*.safetensors"))


def run_millrace(millrace, model, ids, tokens):
    """One process: seconds of the prompt and of each later token, load seconds, peak resident bytes."""
    command = [millrace, "generate", "--model", model, "--ids", ",".join(map(str, ids)), "--max-tokens", str(tokens)]
    command += ["--greedy", "--ignore-eos", "--dtype", "bf16", "--json"]
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            sys.exit(f"millrace ended with {child.returncode}")
        out.seek(0)
        answer = json.loads(out.read().splitlines()[-1])
    times = answer["timings"]
    return {
        "prefill_s": times["first_token_ms"] / 1000,
        "token_s": (times["total_ms"] - times["first_token_ms"]) / 1000 / max(1, tokens - 1),
        "tokens": answer["token_ids"],
        "peak_bytes": usage.ru_maxrss * 1024,
        "load_s": times["load_ms"] / 1000,
    }


class Peer:
    """A program of cpu_peers.py, kept running."""

    def __init__(self, python, kind, model, variant):
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [python, HERE / "cpu_peers.py", kind, model, variant]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.about = self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        sys.exit(f"{self.process.args} ended early")

    def run(self, ids, tokens):
        self.process.stdin.write(json.dumps({"ids": ids, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self.answer()


def machine():
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    vectors = [flag for flag in fields["flags"].split() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
    names = ("vendor_id", "model name", "cpu family", "model")
    processor = {name: fields[name] for name in names if name in fields}
    return {"processor": processor, "vectors": vectors, "cores": os.cpu_count(), "kernel": platform.release()}


def summary(runs):
    """Medians and the range of each figure."""
    figures = {}
    for key in ("prefill_s", "token_s", "load_s", "peak_bytes"):
        values = [run[key] for run in runs if key in run]
        if values:
            figures[key] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millrace", type=Path, required=True)
    parser.add_argument("--transformers", required=True, help="Python that has torch and transformers")
    parser.add_argument("--mistralrs", required=True, help="Python that has the mistralrs wheel")
    parser.add_argument("--name", required=True, help="of the machine, in the result's file name")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the 1.2 GB checkpoint is written [default: temporary]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model, weight_bytes = write_model(arguments.millrace, Path(folder))
        result = compare(arguments, model)
    result["weight_bytes"] = weight_bytes
    path = HERE / "results" / f"cpu-speed-{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for program, figures in result["summary"].items():
        print(f"{program:20} prefill {figures['prefill_s']['median']:.3f} s, token {figures['token_s']['median']:.4f} s")


def compare(arguments, model):
    """All rounds of all programs."""
    wanted = [("transformers", variant) for variant in ("sdpa", "eager")]
    wanted += [("mistralrs", variant) for variant in ("BF16", "F16", "F32")]
    peers = {
        f"{kind} {variant}": (kind, Peer(getattr(arguments, kind), kind, model, variant)) for kind, variant in wanted
    }
    load = run_millrace(arguments.millrace, model, [1], 1)
    rounds = []
    for number in range(-1, arguments.rounds):
        random.seed(number)
        ids = [random.randint(33, 126) for _ in range(PROMPT_TOKENS)]
        runs = {"millrace": run_millrace(arguments.millrace, model, ids, TOKENS["millrace"])}
        for program, (kind, peer) in peers.items():
            runs[program] = peer.run(ids, TOKENS[kind])
        print(number, {program: (round(run["prefill_s"], 3), round(run["token_s"], 4)) for program, run in runs.items()})
        if number >= 0:
            # The round before the first warms the peers up.
            rounds.append({"load_average": os.getloadavg()[0], "runs": runs})
    for run in (run for one in rounds for run in one["runs"].values()):
        drawn = run.pop("tokens")
        run["first_token"] = drawn[0] if drawn else None
    programs = rounds[0]["runs"]
    return {
        "machine": machine(),
        "programs": {program: peer.about for program, (_, peer) in peers.items()},
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": TOKENS,
        "loaded_peak_bytes": load["peak_bytes"],
        "summary": {program: summary([one["runs"][program] for one in rounds]) for program in programs},
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
