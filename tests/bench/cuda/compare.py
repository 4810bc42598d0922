"""Full-width random checkpoints on a card: Millrace's bf16 and transformers' bf16 against transformers in f32.

    python3 compare.py --tools DIR --out OUT.json qwen3-4b|qwen3-vl-2b

Qwen3-4B cut to 8 layers, Qwen3-VL-2B with its whole tower and 8 text layers; weights normal(0, 0.02), norms 1 + normal(0, 0.1).
64 sequences of text, images of two sizes and clips, 16 answer tokens each, which are given, so that every program computes the
same thing: the prompt at once, the answer token by token. All get the same patches. Compared are the last rows of each
sequence: error against f32 at most 1.25 times transformers' own (root mean square of each kind and of all; what one logit in a thousand
exceeds; the largest of all), and the best token equal wherever f32's two best are further apart than transformers' largest error.
"""

import json
import subprocess

import torch

from service import ROOT, environment, part, scratch

SHARE = 1.25
ANSWER, KEEP = 16, 24
IMAGE, VIDEO, START, END = 151655, 151656, 151652, 151653
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 152000}
# Patches (temporal groups, rows, columns) of each kind; two kinds of images.
GRIDS = {"text": [], "image_small": [("image", 1, 10, 12)], "image_wide": [("image", 1, 16, 28)], "clip": [("video", 3, 8, 12)],
         "image_and_clip": [("image", 1, 6, 6), ("video", 2, 6, 10)]}


def config_of(name, options):
    config = json.loads((ROOT / f"tests/bench/cuda/configs/{name}.json").read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] = 8
    if options.quick:
        text |= TINY | {"num_hidden_layers": 4}
        if "vision_config" in config:
            text["rope_scaling"] |= {"mrope_section": [6, 5, 5]}
            config["vision_config"] |= {"depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96,
                                        "out_hidden_size": 128, "deepstack_visual_indexes": [0, 1, 2]}
    return config


@torch.no_grad()
def models(config, folder, device):
    """Writes the checkpoint; transformers' model of it in f32 and in bf16."""
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    settings = kind.config_class.from_dict(config)
    torch.manual_seed(20261125)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        low = kind(settings)
    torch.set_default_dtype(torch.float32)
    low = low.to(torch.bfloat16).eval()
    for name, parameter in low.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        parameter.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.02)
    low.save_pretrained(folder)
    exact = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device).eval()
    low = kind.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(device).eval()
    return exact, low


def cases(config, count):
    """Sequences with ids, answers, items and pixels (bf16, one page for each picture or temporal group)."""
    generator = torch.Generator().manual_seed(7)
    kinds = list(GRIDS) if "vision_config" in config else ["text"]
    draw = lambda n: torch.randint(100, 150_000, (n,), generator=generator).tolist()  # noqa: E731
    made = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        # Lengths around the block (16) and the tile (64), short and long.
        ids = draw([3, 16, 17, 33, 63, 64, 65, 130, 255, 300][(number // len(kinds)) % 10])
        grids, pixels, items = GRIDS[kind], [], []
        for media, t, h, w in grids:
            # Not square or of one size only: the turn of a grid is seen.
            h, w = (w, h) if number % 2 else (h, w)
            slots = 1 if media == "image" else 2
            for _ in range(t):
                ids += (draw(3) if media == "video" else []) + [START]
                items.append({"start": len(ids), "tokens": h * w // 4, "grid_h": h, "grid_w": w})
                ids += [IMAGE if media == "image" else VIDEO] * (h * w // 4) + [END]
                values = torch.rand((h * w, 3, slots, 16, 16), generator=generator) * 2 - 1
                pixels.append((media, t, h, w, values.to(torch.bfloat16)))
            ids += draw(5)
        made.append({"name": f"{kind}-{number}", "kind": kind, "ids": ids, "answer": draw(ANSWER), "items": items, "pixels": pixels,
                     "keep": min(KEEP, len(ids) + ANSWER)})
    return made


def write(made, folder):
    """What examples/logits.rs reads."""
    import safetensors.torch

    folder.mkdir()
    pixels = {f"{c['name']}.pixels.{n}": p[4].contiguous() for c in made for n, p in enumerate(c["pixels"])}
    safetensors.torch.save_file(pixels, folder / "pixels.safetensors")
    plain = [{key: c[key] for key in ("name", "ids", "answer", "items", "keep")} for c in made]
    (folder / "cases.json").write_text(json.dumps({"cases": plain}))


def inputs(case, device, dtype):
    """What transformers takes: whole clips, a still's frame twice."""
    ids = torch.tensor([case["ids"]], device=device)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not case["pixels"]:
        return made
    made["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for kind, key, grid in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        pages = [p for p in case["pixels"] if p[0] == kind]
        if not pages:
            continue
        grids = []
        while sum(g[0] for g in grids) < len(pages):
            _, t, h, w, _ = pages[sum(g[0] for g in grids)]
            grids.append((t, h, w))
        made[grid] = torch.tensor(grids, device=device)
        made[key] = torch.cat([p[4].expand(-1, -1, 2, -1, -1).flatten(1) for p in pages]).to(device, dtype)
    return made


@torch.no_grad()
def reference(model, case, device):
    """Logits of the last `keep` rows: the prompt at once, the answer over the cache, as `generate` does it."""
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    out = model(**inputs(case, device, model.dtype), use_cache=True, logits_to_keep=max(case["keep"] - ANSWER, 1))
    rows = [out.logits[0].float()]
    for token in case["answer"]:
        out = model(input_ids=torch.tensor([[token]], device=device), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0].float())
    return torch.cat(rows)[-case["keep"]:]


def high(difference):
    """The error that one logit in a thousand exceeds."""
    flat = difference.flatten()
    return float(flat.kthvalue(max(1, int(flat.numel() * 0.999))).values) if flat.numel() < 1 << 24 else float(
        flat[:: flat.numel() // (1 << 22)].kthvalue(int(flat[:: flat.numel() // (1 << 22)].numel() * 0.999)).values)


class Tally:
    """Errors of some sequences, ours and transformers'."""

    def __init__(self):
        self.ours, self.theirs, self.exact, self.count = 0.0, 0.0, 0.0, 0
        self.max_ours = self.max_theirs = 0.0
        self.high_ours, self.high_theirs = [], []
        self.decided = self.agree = self.rows = self.agree_all = self.theirs_agree_all = 0
        self.worst_row = 0.0

    def add(self, ours, theirs, exact, largest):
        a, b = (ours - exact).abs(), (theirs - exact).abs()
        self.ours += float(a.square().sum())
        self.theirs += float(b.square().sum())
        self.exact += float(exact.square().sum())
        self.count += a.numel()
        self.max_ours, self.max_theirs = max(self.max_ours, float(a.max())), max(self.max_theirs, float(b.max()))
        self.high_ours.append(high(a))
        self.high_theirs.append(high(b))
        ratio = a.square().sum(-1).sqrt() / b.square().sum(-1).sqrt()
        self.worst_row = max(self.worst_row, float(ratio.max()))
        two = exact.topk(2, dim=-1)
        same = ours.argmax(-1) == two.indices[:, 0]
        clear = two.values[:, 0] - two.values[:, 1] > largest
        self.rows += len(exact)
        self.decided += int(clear.sum())
        self.agree += int((same & clear).sum())
        self.agree_all += int(same.sum())
        self.theirs_agree_all += int((theirs.argmax(-1) == two.indices[:, 0]).sum())

    def result(self):
        rms_ours, rms_theirs = (self.ours / self.count) ** 0.5, (self.theirs / self.count) ** 0.5
        high_ours, high_theirs = sum(self.high_ours) / len(self.high_ours), sum(self.high_theirs) / len(self.high_theirs)
        finite = self.ours == self.ours
        made = {
            "rows": self.rows, "rms": rms_ours, "transformers_rms": rms_theirs, "rms_ratio": rms_ours / rms_theirs,
            "relative_rms": (self.ours / self.exact) ** 0.5, "high": high_ours, "transformers_high": high_theirs,
            "high_ratio": high_ours / high_theirs, "max": self.max_ours, "transformers_max": self.max_theirs,
            "max_ratio": self.max_ours / self.max_theirs, "worst_row_ratio": self.worst_row,
            "rows_decided": self.decided, "of_them_agree": self.agree, "agree_all": self.agree_all,
            "transformers_agree_all": self.theirs_agree_all,
        }
        made["ok"] = finite and made["rms_ratio"] <= SHARE and made["high_ratio"] <= SHARE and self.agree == self.decided
        return made


def run(options):
    import safetensors

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    [name] = options.what
    device = "cuda" if options.cuda else "cpu"
    folder, config = scratch(name), config_of(name, options)
    made = cases(config, 5 if options.quick else 64)
    write(made, folder / "cases")
    few = [c for c in made if int(c["name"].rsplit("-", 1)[1]) < (5 if options.quick else 15)]
    write(few, folder / "few")
    exact_model, low_model = models(config, folder / "model", device)
    print("checkpoint written", flush=True)
    exact = {c["name"]: reference(exact_model, c, device) for c in made}
    theirs = {c["name"]: reference(low_model, c, device) for c in made}
    del exact_model, low_model
    if options.cuda:
        torch.cuda.empty_cache()
    print("reference made", flush=True)
    largest = max(float((theirs[name] - exact[name]).abs().max()) for name in exact)
    result = {"model": name, "machine": torch.cuda.get_device_name() if options.cuda else "cpu", "torch": torch.__version__,
              "sequences": len(made), "bar": SHARE, "largest_transformers_error": largest}
    steps = ("plain", "graphs") if options.cuda else ("plain",)
    for how, chosen, cases_folder in (("single", few, "few"), ("together", made, "cases")):
        for recorded in steps:
            out = folder / "logits.safetensors"
            command = [options.tools / "logits", folder / "model", folder / cases_folder, out, "cuda" if options.cuda else "cpu-bf16", recorded, how]
            ran = subprocess.run(list(map(str, command)), env=environment(options), capture_output=True, text=True, timeout=200)
            if ran.returncode:
                result[f"{how}_{recorded}"] = {"ok": False, "broke": (ran.stderr or ran.stdout)[-1500:]}
                continue
            tallies = {"all": Tally()}
            with safetensors.safe_open(out, "pt") as file:
                for case in chosen:
                    ours = file.get_tensor(f"{case['name']}.logits").to(device)
                    for key in ("all", case["kind"]):
                        tallies.setdefault(key, Tally()).add(ours, theirs[case["name"]], exact[case["name"]], largest)
            rows = {key: tally.result() for key, tally in tallies.items()}
            # The largest error of one kind is one draw: it counts over all of them.
            rows["ok"] = all(row["ok"] for row in rows.values()) and rows["all"]["max_ratio"] <= SHARE
            result[f"{how}_{recorded}"] = rows
            brief = {key: (round(row["rms_ratio"], 4), row["of_them_agree"], row["rows_decided"], row["rows"]) for key, row in rows.items() if key != "ok"}
            print(name, how, recorded, "ok" if rows["ok"] else "MISSED", brief, flush=True)
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    parts = [value for key, value in result.items() if key.startswith(("single_", "together_"))]
    result["ok"] = bool(parts) and all(one["ok"] for one in parts)
    return result


if __name__ == "__main__":
    part(__doc__, run)
