"""Writes the golden fixtures: tiny random checkpoints and what transformers computes with them.

    PYTHON make.py [--out FOLDER] [fixture ...]        (transformers 5.17, torch CPU)

Each fixture gets FOLDER/NAME/ (default: fixtures/ beside this file): config.json, model.safetensors (bf16), cases.json (prompts, media, greedy answers,
position ids) and golden.safetensors (pixels, f32 logits for every position and the bf16 model's error). Everything comes
from fixed seeds and one thread: a second run writes the same bytes.
"""

import argparse
import json
import pathlib

import torch

import families
import media
from reference import bf16_error, greedy, logits_everywhere, positions

HERE = pathlib.Path(__file__).parent
STEPS = 32


def write_family(name, out):
    torch.manual_seed(20261123)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    config, model_class = families.FAMILIES[name]()
    families.write_checkpoint(name, folder, config, model_class)
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    rounded = model_class.from_pretrained(folder, dtype=torch.bfloat16).eval()
    cases, tensors = [], {}
    for case in media.cases(name, config):
        inputs = case.inputs()
        answer = greedy(model, inputs, STEPS)
        whole = case.inputs(answer)
        exact = logits_everywhere(model, whole, case.prompt_tokens)
        low = logits_everywhere(rounded, whole, case.prompt_tokens)
        record = case.describe() | {"answer": answer, "bf16_answer": greedy(rounded, inputs, STEPS)}
        record |= bf16_error(exact, low) | positions(model, inputs)
        cases.append(record)
        tensors[f"{case.name}.logits"] = exact.contiguous()
        for index, pixels in enumerate(case.pages()):
            tensors[f"{case.name}.pixels.{index}"] = pixels.contiguous()
    families.save(tensors, folder / "golden.safetensors")
    (folder / "cases.json").write_text(json.dumps({"steps": STEPS, "cases": cases}, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: {len(cases)} cases, {size / 1e6:.2f} MB")
    for case in cases:
        print(f"  {case['name']}: spread {case['spread']:.3f} bf16 max {case['bf16_max_error']:.4f}",
              f"distinct answer tokens {len(set(case['answer']))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "fixtures")
    parser.add_argument("fixtures", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        for family in arguments.fixtures or families.FAMILIES:
            write_family(family, arguments.out)
