"""`millrace bench` of random full-size models on a card, as README's tables take it.

    python3 tests/bench/cuda/speed.py --tools .device/faithfulness.tar.xz --out $OUT [--models qwen3-4b,qwen3-vl-2b] [--commit REV]
        [--cases suite|vision|prefill] [--no-nats]

Checkpoints are written below /tmp by `millrace random-weights` (and kept for the next call). Writes OUT/millrace-MODEL-CARD-PATH.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from faithfulness import library_path, machine, unpacked

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = Path(__file__).resolve().parent / "configs"
PREFILL = [["--requests", "16", "--input", "4096", "--output", "1"]]
VISION = [["--requests", "64", "--output", "64", "--images", "640x360"], ["--requests", "64", "--output", "64", "--images", "1280x720"],
          ["--requests", "32", "--output", "64", "--clip", "8x640x360"]]


def checkpoint(millrace, name, environment):
    """The model's folder; written once."""
    folder, config = Path("/tmp/speed") / name, Path("/tmp/speed") / f"{name}-config"
    if not (folder / "config.json").exists():
        config.mkdir(parents=True, exist_ok=True)
        (config / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
        for path in CONFIGS.glob(f"{name}-*.json"):  # The processor's files.
            (config / path.name.removeprefix(f"{name}-")).write_text(path.read_text())
        begun = time.monotonic()
        subprocess.run([millrace, "random-weights", "--config", config, "--out", folder], check=True, env=environment)
        print(f"{name}: weights written in {time.monotonic() - begun:.0f} s", flush=True)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="qwen3-4b,qwen3-vl-2b")
    parser.add_argument("--cases", default="suite", choices=["suite", "vision", "prefill"])
    parser.add_argument("--no-nats", action="store_true")
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--commit", default="")
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    tools = unpacked(arguments.tools)
    millrace, card = str(tools / "millrace"), machine()
    environment = {**os.environ, "LD_LIBRARY_PATH": library_path(), "MILLRACE_NATS_SERVER": str(tools / "nats-server"),
                   "MILLRACE_NATS_STORE_DIR": "/tmp/speed/nats", "MILLRACE_CONFIG": str(ROOT / "deploy/gpu.toml"),
                   "MILLRACE_DEVICE": arguments.device, "MILLRACE_LOG": os.environ.get("MILLRACE_LOG", "warn")}
    short = next((word.lower() for word in card.replace(",", " ").split() if word.startswith(("H1", "H2", "A1", "L4", "B2"))), "card")
    path = "in-process" if arguments.no_nats else "nats"
    failed = False
    for name in arguments.models.split(","):
        folder = checkpoint(millrace, name, environment)
        vision = "vl" in name
        calls = {"suite": [["--suite", "vllm-cases"]], "prefill": PREFILL, "vision": VISION if vision else []}[arguments.cases]
        whole = {}
        for call in calls:
            out = Path("/tmp/speed/report.json")
            out.unlink(missing_ok=True)
            command = [millrace, "bench", "--model", folder, *call, "--out", out]
            command += (["--no-nats"] if arguments.no_nats else []) + (["--raw"] if arguments.raw else [])
            run = subprocess.run(command, env=environment, cwd=ROOT)
            failed |= run.returncode != 0
            if out.exists():
                whole = {**json.loads(out.read_text()), **{key: row for key, row in whole.items() if isinstance(row, dict) and "s" in row}}
        if whole:
            whole["machine"]["gpu"] = card
            about = {"gpu": card, "commit": arguments.commit, "build": "dev profile with opt-level 3, feature cuda",
                     "weights": "millrace random-weights, seed 0, bf16", "config": "deploy/gpu.toml"}
            target = arguments.out / f"millrace-{name}-{short}-{path}{'-raw' if arguments.raw else ''}{'' if arguments.cases == 'suite' else '-' + arguments.cases}.json"
            target.write_text(json.dumps({"about": about, **whole}, indent=1) + "\n")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
