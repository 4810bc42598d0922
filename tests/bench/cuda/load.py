"""100,000 short requests through NATS in rounds, by `millrace bench`: the device's allocator is not called in a steady state,
device memory and the process's stay flat.

    python3 load.py --tools DIR --out OUT.json [--device cuda:0] [SECONDS]

Rounds of 10,000 requests of 8 to 24 prompt tokens and 2 answer tokens until 100,000 are done or SECONDS (150) are over. The first
two rounds warm up. Looked at after each: millrace_executor_device_allocations_total and the device memory gauges where the process
has them, device memory in use as nvidia-smi says it, resident memory of the service and of its nats-server.
"""

import json
import subprocess
import time
from pathlib import Path

from service import Process, configuration, environment, part, scratch

ROUND, ALL = 10_000, 100_000


def device_bytes(options):
    if not options.cuda:
        return 0
    said = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    return int(said.stdout.split()[0]) << 20


def server_bytes(process):
    """Resident memory of the managed nats-server, a child of the process."""
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if f"PPid:\t{process.child.pid}\n" in text and "nats-server" in text.split("\n", 1)[0]:
            return int(text.split("VmRSS:")[1].split()[0]) * 1024
    return 0


def look(options, process):
    metrics = process.metrics()
    device = {name: value for name, value in metrics.items() if name.startswith("millrace_executor_device")}
    return {"device": device, "device_used_bytes": device_bytes(options), "resident_bytes": process.memory_bytes(),
            "server_bytes": server_bytes(process), "steps": metrics.get("millrace_executor_steps_total", 0)}


def run(options):
    seconds = float(options.what[0]) if options.what else 150
    count = 500 if options.quick else ROUND
    folder = scratch("load")
    process = Process(options, "up", configuration(folder, options.device, kv="1GiB"))
    rounds, done, broke = [], 0, None
    try:
        process.wait_ready()
        begun = time.monotonic()
        rounds.append({"requests": 0, **look(options, process)})
        while done < ALL and time.monotonic() - begun < seconds:
            command = [options.tools / "millrace", "bench", "--nats", process.nats, "--model", "demo", "--vocabulary", "1000", "--class", "batch",
                       "--requests", count, "--input", 8 + len(rounds) % 17, "--output", 2, "--seed", len(rounds), "--json"]
            ran = subprocess.run(list(map(str, command)), env=environment(options), capture_output=True, text=True, timeout=200, cwd=folder)
            if ran.returncode:
                broke = ran.stderr[-1500:]
                break
            report = json.loads(ran.stdout)
            row = next(value for key, value in report.items() if key.startswith("n"))
            done += count
            rounds.append({"requests": done, "s": row["s"], "requests_s": round(count / row["s"], 1), **look(options, process)})
            print({key: value for key, value in rounds[-1].items()}, flush=True)
    finally:
        code = process.stop()
    first, last = rounds[min(2, len(rounds) - 1)], rounds[-1]
    counters = [key for key in last["device"] if "allocation" in key]
    # The first rounds may still record steps and grow buffers; behind them nothing is allocated.
    result = {
        "requests": done, "rounds": rounds, "exit": code, "log_warnings": [line for line in process.log if '"WARN"' in line or '"ERROR"' in line][:10],
        "allocator_calls": {key: [first["device"].get(key), last["device"][key]] for key in counters},
        "device_used_growth_bytes": last["device_used_bytes"] - first["device_used_bytes"],
        "resident_growth_bytes": last["resident_bytes"] - first["resident_bytes"],
        "server_growth_bytes": last["server_bytes"] - first["server_bytes"],
    }
    if broke:
        result["broke"] = broke
    constant = all(a == b for a, b in result["allocator_calls"].values())
    seen = bool(counters) or not options.cuda
    # 64 MiB: what glibc's arenas and the service's caches of outputs may move by.
    flat = abs(result["device_used_growth_bytes"]) < 32 << 20 and result["resident_growth_bytes"] < 64 << 20
    result |= {"allocator_constant": constant, "allocator_metric_seen": bool(counters), "memory_flat": flat,
               "ok": not broke and code == 0 and done >= (count if options.quick else ALL) and constant and seen and flat}
    return result


if __name__ == "__main__":
    part(__doc__, run)
