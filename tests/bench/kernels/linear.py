"""skinny_linear: checks and timings."""
import torch

from device import median_us, multiprocessors, worst

SHAPES = {"qkv4b": (6144, 2560), "o4b": (2560, 4096), "gate_up4b": (19456, 2560), "down4b": (2560, 9728), "lm_head4b": (151936, 2560),
          "qkv2b": (4096, 2048), "o2b": (2048, 2048), "gate_up2b": (12288, 2048), "down2b": (2048, 6144)}


def skinny(module, x, w, bias, y, blocks=1, overlap=False, gated=False):
    m, k = x.shape
    n, batch = w.shape[0], 1 if m <= 8 else 2
    tile = 32 if gated else 16 * blocks
    r = 2 if gated else blocks
    kernel = f"skinny_swiglu_b{batch}" if gated else f"skinny_linear_r{blocks}_b{batch}"
    grid = min(-(-n // tile), 2 * multiprocessors())
    module.launch(kernel, (grid,), 256, 98304 + 8192 * r * batch, x, w, bias, y, m, n, k, overlap=overlap)


def check_linear(module):
    largest = 0.0
    for n, k in ((48, 72), (37, 64), (2560, 2560), (1000, 9728), (6144, 2048), (20000, 520)):
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
        whole = None
        for m in (16, 1, 2, 5, 8, 9, 13):
            for blocks in (1, 2):
                y = torch.full((m + 1, n), 12345.0, device="cuda", dtype=torch.bfloat16)
                skinny(module, x[:m], w, bias, y, blocks)
                torch.cuda.synchronize()
                assert (y[m] == 12345.0).all(), "wrote past the last row"
                whole = y[:16].clone() if whole is None else whole
                assert (y[:m] == whole[:m]).all(), f"rows depend on their number: {n} x {k}, {m} rows, {blocks}"
                ratio, error = worst(y[:m], torch.nn.functional.linear(x[:m], w, bias), x[:m].double() @ w.double().T + bias.double())
                largest = max(largest, ratio)
                if not ratio <= 2.0:
                    print(f"linear {m} x {n} x {k} r{blocks}: error {error:.2e}, {ratio:.2f}x plain")
        if n % 2 == 0:
            for m in (1, 7, 16):
                y = torch.full((m + 1, n // 2), 12345.0, device="cuda", dtype=torch.bfloat16)
                skinny(module, x[:m], w, None, y, gated=True)
                torch.cuda.synchronize()
                both = torch.nn.functional.linear(x[:m], w)
                gate, up = both.float().chunk(2, -1)
                plain = ((gate / (1 + (-gate).exp())).to(torch.bfloat16).float() * up).to(torch.bfloat16)
                gate, up = (x[:m].double() @ w.double().T).chunk(2, -1)
                ratio, error = worst(y[:m], plain, gate * gate.sigmoid() * up)
                largest = max(largest, ratio)
                if not (ratio <= 2.0 and (y[m] == 12345.0).all()):
                    print(f"swiglu {m} x {n} x {k}: error {error:.2e}, {ratio:.2f}x plain")
    return largest


def time_linear(module, copy, rows_list=(1, 8, 16), shapes=None, blocks_list=(1, 2)):
    """Each shape in a captured chain over weights of more than 400 MB, plain and with overlapping launches."""
    table = []
    for name in shapes or SHAPES:
        n, k = SHAPES[name]
        count = max(2, -(-(400 << 20) // (n * k * 2)))
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for m in rows_list:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            row = {"kernel": "skinny_linear", "shape": name, "rows": m, "MB": n * k * 2 / 1e6}
            for blocks in blocks_list:
                for overlap in (False, True):
                    us = median_us([lambda w=w: skinny(module, x, w, None, y, blocks, overlap) for w in weights], rounds=5)
                    row[f"r{blocks}{'_overlap' if overlap else ''}"] = (2 * n * k + 2 * m * (n + k)) / us * 1e6 / copy
            if name.startswith("gate_up"):
                us = median_us([lambda w=w: skinny(module, x, w, None, y, 2, True, True) for w in weights], rounds=5)
                row["swiglu_overlap"] = 2 * n * k / us * 1e6 / copy
            us = median_us([lambda w=w: torch.nn.functional.linear(x, w) for w in weights], rounds=3)
            row["cublas"] = 2 * n * k / us * 1e6 / copy
            table.append(row)
        del weights
    return table


def time_layer(module, copy, m=1):
    """The four linears of Qwen3-4B's layers in order, 12 layers: the share of copy bandwidth of the whole chain."""
    names = ["qkv4b", "o4b", "gate_up4b", "down4b"]
    weights = [[torch.randn(*SHAPES[name], device="cuda", dtype=torch.bfloat16) for name in names] for _ in range(12)]
    x = torch.randn(m, 9728, device="cuda", dtype=torch.bfloat16) * 0.01
    y = torch.empty(m, 19456, device="cuda", dtype=torch.bfloat16)
    row = {"kernel": "skinny_linear", "shape": "12 layers of 4b", "rows": m}
    for blocks in (1, 2):
        calls = [lambda w=w: skinny(module, x.view(-1)[:m * w.shape[1]].view(m, -1), w, None, y, blocks, True) for layer in weights for w in layer]
        us = median_us(calls, rounds=5)
        row[f"r{blocks}_overlap"] = sum(w.numel() * 2 for layer in weights for w in layer) / (us * len(calls)) * 1e6 / copy
    return row
