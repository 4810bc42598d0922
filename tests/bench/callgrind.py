#!/usr/bin/env python3
"""Counts the instructions of planning and applying one step under valgrind, and holds them against the bars.

    python3 tests/bench/callgrind.py            measure and write tests/bench/results/policy-callgrind.json
    python3 tests/bench/callgrind.py --check    measure, compare with the bars, write nothing

Instructions repeat from run to run, times on a shared machine do not. Installs valgrind if it is missing.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULT = ROOT / "tests/bench/results/policy-callgrind.json"
STEPS = 64
RUNNING = (256, 512, 1024)
WAITING = (0, 1_000, 10_000)
MAX_INSTRUCTIONS = 200_000  # 256 running, 1,000 waiting
MAX_PLAN_BYTES = 40  # per decoding sequence
# "Linear" and "independent" as numbers: cost per running sequence at 1,024 over that at 256; cost with 10,000 waiting
# over that with none.
MAX_GROWTH_PER_SEQUENCE = 1.25
MAX_GROWTH_WITH_WAITING = 1.05


def need_valgrind():
    if not shutil.which("valgrind"):
        subprocess.run(["apt-get", "install", "-y", "-q", "valgrind"], check=True, stdout=sys.stderr)


def build():
    command = ["cargo", "bench", "-p", "millrace-scheduler", "--bench", "plan", "--no-run", "--locked", "--message-format=json"]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    programs = [m["executable"] for m in messages if m.get("target", {}).get("name") == "plan" and m.get("executable")]
    return programs[-1]


def count(program, running, waiting, short_of):
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*measured_step*",
                   f"--callgrind-out-file={folder}/out", program, "--running", str(running), "--waiting", str(waiting),
                   "--steps", str(STEPS), "--short-of", short_of]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
    collected = int(re.search(r"Collected\s*:\s*(\d+)", run.stderr).group(1))
    assert collected > 0, "nothing was counted: measured_step was not found"
    plan_bytes = float(re.search(r"plan_bytes_per_sequence ([\d.]+)", run.stdout).group(1))
    return {"running": running, "waiting": waiting, "short_of": short_of,
            "instructions_per_step": round(collected / STEPS), "plan_bytes_per_decoding_sequence": plan_bytes}


def verdicts(cases):
    def cost(running, waiting, short_of="slots"):
        return next(c["instructions_per_step"] for c in cases
                    if (c["running"], c["waiting"], c["short_of"]) == (running, waiting, short_of))

    most = max(c["plan_bytes_per_decoding_sequence"] for c in cases)
    growth = cost(1024, 1_000) / 1024 / (cost(256, 1_000) / 256)
    with_waiting = max(cost(running, 10_000) / cost(running, 0) for running in RUNNING)
    bars = [("instructions_256_running_1000_waiting", cost(256, 1_000), MAX_INSTRUCTIONS),
            ("per_sequence_cost_1024_over_256", round(growth, 3), MAX_GROWTH_PER_SEQUENCE),
            ("cost_10000_waiting_over_none", round(with_waiting, 3), MAX_GROWTH_WITH_WAITING),
            ("plan_bytes_per_decoding_sequence", most, MAX_PLAN_BYTES)]
    return [{"bar": name, "measured": value, "limit": limit, "met": value < limit} for name, value, limit in bars]


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true", help="write nothing")
    check = arguments.parse_args().check
    need_valgrind()
    program = build()
    cases = [count(program, running, waiting, "slots") for running in RUNNING for waiting in WAITING]
    cases += [count(program, 256, waiting, "blocks") for waiting in (1_000, 10_000)]
    bars = verdicts(cases)
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True).stdout.strip()
    result = {"what": "instructions of Planner::apply + Planner::plan for one step of decodes, release build",
              "valgrind": version, "steps": STEPS, "cases": cases, "bars": bars}
    print(json.dumps(result, indent=1))
    if not check:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if all(bar["met"] for bar in bars) else 1)


if __name__ == "__main__":
    main()
