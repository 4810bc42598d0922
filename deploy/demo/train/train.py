"""Trains the demo captioner: from scratch or from another checkpoint, on a CPU or a GPU.

    python train.py --init none --like /path/to/folder --out model --device cuda --minutes 10 --tokens 40000
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train.py --init /path/to/folder --out model --minutes 90

Loss on the caption tokens only; AdamW, warm-up and cosine; an exponential mean of the weights is what gets saved, every
few minutes, with the configuration, the tokenizer and the processors beside it. `--weights FILE` is a JSON object of
the mix of `batches.py`, read again whenever it changes, so that a run can lean on whatever is weakest.
"""

import argparse
import copy
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

from batches import Mix, to_tensors
from forward import Forward
from layout import Layout

PLAIN_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
               "video_preprocessor_config.json", "chat_template.jinja", "generation_config.json")


class Stream(IterableDataset):
    """Batches made in worker processes, each with its own seed; the mix is read again from `weights` as it changes."""

    def __init__(self, folder, seed, tokens, rows, weights):
        self.folder, self.seed, self.tokens, self.rows, self.weights = folder, seed, tokens, rows, weights

    def __iter__(self):
        torch.set_num_threads(1)
        worker = get_worker_info()
        mix = Mix(Layout(self.folder), self.seed * 1000 + (worker.id if worker else 0), self.tokens, self.rows)
        seen = None
        for count, batch in enumerate(mix.batches()):
            if self.weights and count % 20 == 0 and Path(self.weights).exists():
                text = Path(self.weights).read_text()
                if text != seen:
                    seen, mix.weights = text, json.loads(text)
            yield {k: torch.from_numpy(v) if hasattr(v, "shape") else v for k, v in batch.items()}


def save(mean, like, out):
    """Writes the folder whole, then moves it into place file by file (the weights last)."""
    out, fresh = Path(out), Path(str(out) + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.deepcopy(mean).to(torch.bfloat16).cpu().save_pretrained(fresh)
    out.mkdir(parents=True, exist_ok=True)
    for name in PLAIN_FILES:
        if not (out / name).exists():
            shutil.copyfile(Path(like) / name, out / name)
    (fresh / "model.safetensors").replace(out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)
    shutil.rmtree(fresh)


def optimiser(model, args):
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)


def rate(args, progress, step):
    """Warm-up over `--warmup` steps, then a cosine over the rest of the time, down to 2 % of the peak."""
    low = 0.02
    cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return args.lr * min(1.0, (step + 1) / args.warmup) * cosine


def average_gradients(parameters, world):
    """Means the gradients over the processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(mean.view_as(g))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="none", help="folder whose weights to start from, or none")
    parser.add_argument("--like", default=str(Path(__file__).parent.parent / "model"),
                        help="folder whose configuration, tokenizer and processors to use")
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--elapsed", type=float, default=0, help="minutes of the schedule already behind")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--beta2", type=float, default=0.98)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--mean", type=float, default=0.995, help="decay of the mean of the weights")
    parser.add_argument("--tokens", type=int, default=1500, help="size of a batch of one process, in tokens")
    parser.add_argument("--rows", type=int, default=64, help="most samples in a batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches (each of one kind) to an optimiser step")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=180, help="seconds")
    parser.add_argument("--weights", default=None, help="JSON file with the mix")
    args = parser.parse_args()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        args.device = f"cuda:{rank}" if args.device == "cuda" else args.device
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    if args.init == "none":
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(args.like)).float()
    else:
        model = Qwen3VLForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
    model.to(args.device).train()
    mean = copy.deepcopy(model).eval().requires_grad_(False)
    forward = Forward(model).to(args.device)
    optimizer = optimiser(model, args)
    stream = Stream(args.like, args.seed * 100 + rank, args.tokens, args.rows, args.weights)
    loader = iter(DataLoader(stream, batch_size=None, num_workers=args.workers, pin_memory=args.device != "cpu",
                             prefetch_factor=8 if args.workers else None))
    begun = saved = time.monotonic()
    cast = torch.autocast(torch.device(args.device).type, torch.bfloat16)
    step = samples = 0
    losses, right = [], []
    span = args.minutes * 60
    while True:
        now = time.monotonic()
        spent = now - begun
        if world > 1:  # the processes must agree on when to stop
            clock = torch.tensor([spent], dtype=torch.float64, device=args.device)
            dist.broadcast(clock, 0)
            spent = float(clock)
        if rank == 0 and (spent >= span or now - saved > args.save_every):
            save(mean, args.like, args.out)
            saved = now
        if spent >= span:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(args, (spent + args.elapsed * 60) / (span + args.elapsed * 60), step)
        for _ in range(args.accumulate):
            batch = next(loader)
            with cast:
                logits = forward(**to_tensors(batch, args.device))
            targets = batch["targets"].to(args.device, non_blocking=True)
            loss = F.cross_entropy(logits.float(), targets) / args.accumulate
            loss.backward()
            samples += len(batch["ids"])
            losses.append(loss.detach() * args.accumulate)
            right.append((logits.detach().argmax(-1) == targets).float().mean())
        if world > 1:
            average_gradients(model.parameters(), world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(args.mean, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), 1 - keep)
        step += 1
        if step % 50 == 0 and rank == 0:
            print(f"{spent / 60:6.1f} min  step {step}  samples {samples * world}  {samples * world / spent:.0f}/s  "
                  f"lr {optimizer.param_groups[0]['lr']:.2e}  loss {torch.stack(losses).mean():.4f}  "
                  f"tokens right {torch.stack(right).mean():.4f}", flush=True)
            losses, right = [], []
    if rank == 0:
        print(json.dumps({"steps": step, "samples": samples * world, "minutes": round(spent / 60, 1),
                          "seed": args.seed, "init": args.init, "device": args.device, "processes": world}))


if __name__ == "__main__":
    main()
