"""Writes README.md's measured tables from the stored results, or checks that they are fresh.

    python3 tests/bench/readme.py           # rewrite
    python3 tests/bench/readme.py --check   # exit 1 if README.md differs from what the results say
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ACCURACY = ROOT / "deploy/demo/train/accuracy.json"
AGREEMENT = ROOT / "tests/bench/results"
LIBRARIES = ("transformers", "torch", "mistralrs")
BLOCK = re.compile(r"(<!-- accuracy: [^>]*-->\n).*?(<!-- end of accuracy -->)", re.S)
GPU = re.compile(r"(<!-- gpu: [^>]*-->\n).*?(<!-- end of gpu -->)", re.S)
GPU_RATES = {"out_tok_s": "output tok/s", "tok_s": "prompt tok/s", "img_s": "images/s", "clips_s": "clips/s"}
SPEED = re.compile(r"(<!-- speed: [^>]*-->\n).*?(<!-- end of speed -->)", re.S)


def accuracy_table():
    """One row a category: samples, exact matches, share."""
    rows = ["| held-out samples | n | exact | share |", "|---|---|---|---|"]
    for name, row in json.loads(ACCURACY.read_text())["categories"].items():
        share = 100 * row["right"] / row["count"]
        rows.append(f"| {name.replace('_', ' ')} | {row['count']} | {row['right']} | {share:.1f} % |")
    return "\n".join(rows) + "\n"


def agreement_table():
    """One row a stored run of demo_eval.py: answers through NATS against transformers' greedy text."""
    rows = ["", "| sent through NATS (CPU) | n | same text as transformers | true caption |", "|---|---|---|---|"]
    for path in sorted(AGREEMENT.glob("demo-*.json")):
        row = json.loads(path.read_text())
        rows.append(f"| {path.stem} | {row['n']} | {row['same_as_transformers']} | {row['exact']} |")
    return "\n".join(rows) + "\n"


def spread(figure, scale):
    """Median and range."""
    median, least, most = (figure[key] * scale for key in ("median", "least", "most"))
    return f"{median:.0f} ({least:.0f} to {most:.0f})"


def speed_tables():
    """One table a stored run of cpu_speed.py; a ratio is the program's median over Millrace's."""
    rows = []
    for path in sorted(AGREEMENT.glob("cpu-speed-*.json")):
        result = json.loads(path.read_text())
        machine, programs = result["machine"], result["summary"]
        processor = " ".join(machine["processor"].values())
        loads = [one["load_average"] for one in result["rounds"]]
        versions = {name: about[name] for about in result["programs"].values() for name in LIBRARIES if name in about}
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        rows += [
            f"{processor}, {machine['cores']} cores, {len(loads)} rounds at a load average of {min(loads):.1f} to"
            f" {max(loads):.1f}; {named}:",
            "",
            f"| program | prompt of {result['prompt_tokens']} tokens, ms | times Millrace's"
            " | one more token, ms | times Millrace's | peak memory, MB |",
            "|---|---|---|---|---|---|",
        ]
        for program, figures in programs.items():
            cells = [program]
            for key in ("prefill_s", "token_s"):
                ratio = figures[key]["median"] / programs["millrace"][key]["median"]
                cells += [spread(figures[key], 1000), f"{ratio:.2f}"]
            cells.append(f"{figures['peak_bytes']['most'] / 1e6:.0f}")
            rows.append("| " + " | ".join(cells) + " |")
        weights, loaded = result["weight_bytes"] / 1e6, result["loaded_peak_bytes"] / 1e6
        rows += ["", f"Weights: {weights:.0f} MB; Millrace's peak after loading and one token: {loaded:.0f} MB."]
    return "\n".join(rows) + "\n"


def gpu_tables():
    """One table a model that `millrace bench` measured through NATS on a GPU, beside vLLM on the same kind of card."""
    rows = []
    for path in sorted(AGREEMENT.glob("millrace-*-nats.json")):
        ours = json.loads(path.read_text())
        name, card = path.stem.removeprefix("millrace-").removesuffix("-nats").rsplit("-", 1)
        theirs = json.loads((AGREEMENT / f"vllm-{name}-{card}.json").read_text())
        rows += [
            f"{name}, random weights, bf16, one {ours['machine']['gpu']}, commit"
            f" {ours['about']['commit']}; ready after {ours['init_s']} s (vLLM {theirs['init_s']} s):",
            "",
            "| case | unit | Millrace, through NATS | vLLM 0.25.1 | ratio | first token p50 / p99, ms | device idle between steps |",
            "|---|---|---|---|---|---|---|",
        ]
        for case, row in ours.items():
            unit = next((unit for unit in GPU_RATES if isinstance(row, dict) and unit in row), None)
            if unit is None or case not in theirs:
                continue
            first, idle = row["ttft_ms"], 100 * row["steps"]["idle_share"]
            rows.append(
                f"| {case} | {GPU_RATES[unit]} | {row[unit]:,.1f} | {theirs[case][unit]:,.1f} | {row[unit] / theirs[case][unit]:.2f} |"
                f" {first['p50']:.0f} / {first['p99']:.0f} | {idle:.1f} % |"
            )
        rows.append("")
    return "\n".join(rows) + "\n"


def main():
    text = README.read_text()
    fresh = BLOCK.sub(lambda found: found[1] + accuracy_table() + agreement_table() + found[2], text)
    fresh = GPU.sub(lambda found: found[1] + gpu_tables() + found[2], fresh)
    fresh = SPEED.sub(lambda found: found[1] + speed_tables() + found[2], fresh)
    if "--check" in sys.argv:
        if fresh != text:
            sys.exit("README.md does not say what the stored results say: run python3 tests/bench/readme.py")
        return
    README.write_text(fresh)


if __name__ == "__main__":
    main()
