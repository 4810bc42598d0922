#!/usr/bin/env python3
"""Measures what batching gains on the CPU through a real NATS server: 64 jobs published at once against the same 64 one after
another, on a random Qwen3 whose weights dominate a step. Same process, same jobs, one run behind the other.

    python3 tests/bench/batching.py [--millrace target/release/millrace] [--jobs 64] [--out FILE]

Needs nats-py (tests/run.sh installs it) and a built `millrace`. Ratios of one run are comparable, its seconds are not.
"""

import argparse
import asyncio
import json
import os
import pathlib
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULT = ROOT / "tests/bench/results/batching-cpu-f32.json"
BAR = 4.0
MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 12,
    "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16", "eos_token_id": 2, "bos_token_id": 1,
}


def pipeline(folder, model, dtype):
    text = f"""
[nats]
url = "managed"
store_dir = "{folder}/nats"
[[models]]
name = "bench"
path = "{model}"
default = true
[pager]
dir = "{folder}/pages"
[scheduler]
max_sequences = 64
waiting = 64
[executor]
kv_bytes = "512MiB"
dtype = "{dtype}"
[telemetry]
listen = "127.0.0.1:0"
log_format = "json"
"""
    path = pathlib.Path(folder) / "pipeline.toml"
    path.write_text(text)
    return path


def start(millrace, config):
    child = subprocess.Popen([millrace, "up", "--config", str(config)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said = []
    for line in child.stderr:
        said.append(line)
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if fields.get("message") == "ready":
            return child, fields["nats"]
    raise SystemExit("millrace did not get ready:\n" + "".join(said[-20:]))


def document(index, arguments):
    ids = [20 + (index * 131 + place * 7) % 900 for place in range(arguments.input)]
    return {"prompt_token_ids": ids, "max_tokens": arguments.output, "ignore_eos": True, "sampling": {"temperature": 0.0}}


class Client:
    """Publishes jobs and waits for their finals."""

    def __init__(self, connection):
        self.stream, self.connection = connection.jetstream(), connection
        self.finals = {}

    async def listen(self):
        async def heard(message):
            chunk = json.loads(message.data)
            if chunk.get("type", chunk.get("kind")) == "final" or "status" in chunk:
                job = message.subject.rsplit(".", 1)[-1]
                if job in self.finals and not self.finals[job].done():
                    self.finals[job].set_result((time.perf_counter(), chunk))
        await self.connection.subscribe("millrace.v1.out.>", cb=heard)

    async def publish(self, job, body):
        self.finals[job] = asyncio.get_running_loop().create_future()
        await self.stream.publish(f"millrace.v1.jobs.interactive.bench.{job}", json.dumps(body).encode(), headers={"Nats-Msg-Id": job})

    async def ended(self, job):
        at, chunk = await asyncio.wait_for(self.finals[job], 600)
        assert chunk["status"] == "done", chunk
        return at


async def measure(url, arguments):
    import nats

    connection = await nats.connect(url)
    client = Client(connection)
    await client.listen()

    async def at_once(prefix, count):
        begun = time.perf_counter()
        names = [f"{prefix}-{index}" for index in range(count)]
        await asyncio.gather(*(client.publish(name, document(index, arguments)) for index, name in enumerate(names)))
        return max([await client.ended(name) for name in names]) - begun

    async def in_turn(prefix, count):
        begun = time.perf_counter()
        for index in range(count):
            await client.publish(f"{prefix}-{index}", document(1_000 + index, arguments))
            await client.ended(f"{prefix}-{index}")
        return time.perf_counter() - begun

    await at_once("warm", 8)
    together = await at_once("together", arguments.jobs)
    one_by_one = await in_turn("single", arguments.jobs)
    await connection.close()
    return together, one_by_one


def machine():
    processor = next((l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "")
    return {"processor": processor, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millrace", default=str(ROOT / "target/release/millrace"))
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--input", type=int, default=16)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--dtype", default="f32", choices=("f32", "bf16"), help="what the engine computes in")
    parser.add_argument("--build", default="release", help="how the binary was built, for the record")
    parser.add_argument("--out", default=str(RESULT))
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        config, model = pathlib.Path(folder) / "config", pathlib.Path(folder) / "model"
        config.mkdir()
        (config / "config.json").write_text(json.dumps(MODEL))
        subprocess.run([arguments.millrace, "random-weights", "--config", str(config), "--out", str(model)], check=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            source = ROOT / "deploy/demo/model" / name
            if source.exists() and not (model / name).exists():
                (model / name).write_bytes(source.read_bytes())
        child, url = start(arguments.millrace, pipeline(folder, model, arguments.dtype))
        try:
            together, one_by_one = asyncio.run(measure(url, arguments))
        finally:
            child.terminate()
            child.wait(60)
    ratio = one_by_one / together
    result = {"what": f"{arguments.jobs} jobs of {arguments.input} prompt and {arguments.output} answer tokens through NATS, interactive class",
              "computes_in": arguments.dtype, "model": "random Qwen3, weights in bf16: " + ", ".join(f"{key} {MODEL[key]}" for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")),
              "build": arguments.build, "machine": before, "together_s": round(together, 3), "one_after_another_s": round(one_by_one, 3),
              "ratio": round(ratio, 2), "bar": BAR, "met": ratio >= BAR}
    pathlib.Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
