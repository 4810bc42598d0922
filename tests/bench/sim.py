#!/usr/bin/env python3
"""Runs the simulator's scenarios at full size and stores each run as tests/bench/results/sim-NAME.json.

    python3 tests/bench/sim.py [--simulator target/release/millrace-sim] [NAME ...]

Virtual figures repeat exactly from the seed; `wall_secs` is this machine's.
"""

import argparse
import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = {
    "saturation": "saturation --jobs 10000",
    "storm": "storm --jobs 1000",
    "storm-run-ahead-1": "storm --jobs 1000 --run-ahead 1",
    "fairness": "fairness",
    "flood": "flood",
    "flood-waiting-4096": "flood --waiting 4096",
    "starvation": "starvation",
    "mixed-poisson": "mixed --jobs 20000",
    "mixed-bursty": "mixed --jobs 20000 --arrivals bursty",
    "mixed-diurnal": "mixed --jobs 20000 --arrivals diurnal",
    "linear-1": "linear --engines 1 --jobs 1000",
    "linear-10": "linear --engines 10 --jobs 10000",
    "linear-100": "linear --engines 100 --jobs 100000",
    "linear-100-two-choices": "linear --engines 100 --jobs 100000 --two-choices",
    "linear-1000": "linear --engines 1000 --jobs 1000000",
    "linear-1000-two-choices": "linear --engines 1000 --jobs 1000000 --two-choices",
    "million": "mixed --engines 1000 --jobs 1000000 --arrivals diurnal --per-sec 30000",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulator", default=str(ROOT / "target/release/millrace-sim"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    for name in arguments.names or RUNS:
        run = subprocess.run([arguments.simulator, *RUNS[name].split(), "--json"], check=True, capture_output=True, text=True)
        result = {"command": f"millrace-sim {RUNS[name]}", **json.loads(run.stdout)}
        (ROOT / f"tests/bench/results/sim-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {result['wall_secs']:.1f} s")


if __name__ == "__main__":
    main()
