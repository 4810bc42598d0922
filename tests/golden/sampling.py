"""Writes fixtures/sampling.json: rows of logits, settings, and what transformers' processors and warpers leave of them."""

import json
import pathlib

import torch
from transformers.generation import logits_process as lp

VOCAB = 53
SETTINGS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(top_k=1),
    dict(top_p=0.8),
    dict(top_p=0.05),
    dict(min_p=0.1),
    dict(temperature=0.7, top_k=20, top_p=0.8),
    dict(temperature=2.0, top_k=30, top_p=0.95, min_p=0.03, repetition_penalty=1.3),
    dict(repetition_penalty=0.8, top_k=7),
    dict(temperature=0.6, top_k=9, top_p=0.7, min_p=0.2, repetition_penalty=1.05),
]


def expected(logits, history, s):
    scores, ids = logits[None].clone(), torch.tensor([history])
    steps = lp.LogitsProcessorList()
    if "repetition_penalty" in s:
        steps.append(lp.RepetitionPenaltyLogitsProcessor(s["repetition_penalty"]))
    if "temperature" in s:
        steps.append(lp.TemperatureLogitsWarper(s["temperature"]))
    if "top_k" in s:
        steps.append(lp.TopKLogitsWarper(s["top_k"]))
    if "top_p" in s:
        steps.append(lp.TopPLogitsWarper(s["top_p"]))
    if "min_p" in s:
        steps.append(lp.MinPLogitsWarper(s["min_p"]))
    return steps(ids, scores).softmax(-1)[0].tolist()


def main():
    generator = torch.Generator().manual_seed(3)
    cases = []
    for n, settings in enumerate(SETTINGS * 3):
        logits = 2 * torch.randn(VOCAB, generator=generator)
        if n % 2:
            # As a bf16 head gives them: many ties, also at the k-th.
            logits = (logits * 2).round() / 2
        history = torch.randint(0, VOCAB, (9,), generator=generator).tolist()
        cases.append(dict(logits=logits.tolist(), history=history, settings=settings, probabilities=expected(logits, history, settings)))
    path = pathlib.Path(__file__).parent / "fixtures" / "sampling.json"
    path.write_text(json.dumps(cases) + "\n")
    print(f"sampling: {len(cases)} cases, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
