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
BLOCK = re.compile(r"(<!-- accuracy: [^>]*-->\n).*?(<!-- end of accuracy -->)", re.S)


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


def main():
    text = README.read_text()
    fresh = BLOCK.sub(lambda found: found[1] + accuracy_table() + agreement_table() + found[2], text)
    if "--check" in sys.argv:
        if fresh != text:
            sys.exit("README.md does not say what the stored results say: run python3 tests/bench/readme.py")
        return
    README.write_text(fresh)


if __name__ == "__main__":
    main()
