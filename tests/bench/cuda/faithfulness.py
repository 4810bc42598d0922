"""Everything of faithfulness and faults that needs a card, in one call; each part by itself, with a time limit, none stops the others.

    python3 tests/bench/cuda/faithfulness.py --tools .device/faithfulness.tar.xz --out $OUT [--device cuda:0] [--only PART,...] [--quick]

Writes OUT/faithfulness.json after every part, and OUT/faithfulness.log. Parts that share the card run side by side; those that
measure its memory run alone.
"""

import argparse
import concurrent.futures
import glob
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Stages one after another; in a stage lanes side by side; in a lane parts one after another: (name, script, arguments, seconds).
STAGES = [
    [
        [("tests", "executables.py", ["tests"], 200), ("captions", "captions.py", [], 150)],
        [("compare_qwen3_4b", "compare.py", ["qwen3-4b"], 200), ("compare_qwen3_vl_2b", "compare.py", ["qwen3-vl-2b"], 240)],
        [("refusals", "faults.py", ["refusals"], 60), ("nan", "faults.py", ["nan"], 60)],
    ],
    [
        [("lost", "faults.py", ["lost"], 90), ("device", "faults.py", ["device"], 120)],
        [("sanitizer", "executables.py", ["sanitizer"], 210)],
    ],
    [[("load", "load.py", ["150"], 260)]],
    [[("memory", "faults.py", ["memory"], 150)]],
]


def unpacked(tools):
    """The folder of executables, out of the archive if it is one."""
    if tools.is_dir():
        return tools
    folder = Path(tempfile.mkdtemp(prefix="faithfulness-tools-"))
    with tarfile.open(tools) as archive:
        archive.extractall(folder, filter="tar")
    return folder


def library_path():
    """Where cuBLASLt of CUDA 13 and the driver are, for programs that look for them by name."""
    folders = [*glob.glob("/usr/local/cuda*/lib64"), *glob.glob("/usr/local/cuda*/targets/x86_64-linux/lib"), "/usr/local/nvidia/lib64"]
    for base in sys.path:
        folders += glob.glob(f"{base}/nvidia/*/lib")
    having = [folder for folder in folders if glob.glob(f"{folder}/libcublasLt.so.13") or glob.glob(f"{folder}/libcuda.so*")]
    return ":".join(dict.fromkeys([*having, *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tools, only = unpacked(arguments.tools), set(filter(None, arguments.only.split(",")))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "LD_LIBRARY_PATH": library_path()}
    log, lock, begun = open(arguments.out / "faithfulness.log", "w"), threading.Lock(), time.monotonic()
    results = {"machine": machine(), "device": arguments.device, "libraries": environment["LD_LIBRARY_PATH"], "parts": {}}

    def say(text):
        with lock:
            log.write(text + "\n")
            log.flush()

    def keep(name, result):
        with lock:
            results["parts"][name] = result
            results["seconds"] = round(time.monotonic() - begun, 1)
            (arguments.out / "faithfulness.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"[{time.monotonic() - begun:6.1f}] {name:20} {'ok' if result.get('ok') else 'NOT OK':7} {result.get('seconds', '')} {str(result.get('broke', ''))[:300]}", flush=True)

    def run(name, script, extra, seconds):
        out = Path("/tmp") / f"faithfulness-{name}.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / script), "--tools", str(tools), "--device", arguments.device, "--out", str(out)]
        command += (["--quick"] if arguments.quick else []) + extra
        child = subprocess.Popen(command, env=environment, cwd=HERE.parents[2], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 start_new_session=True)
        timer = threading.Timer(seconds, lambda: os.killpg(child.pid, 9))
        timer.start()
        for line in child.stdout:
            say(f"[{time.monotonic() - begun:6.1f}] {name}: {line.rstrip()[:4000]}")
        code = child.wait()
        timer.cancel()
        result = json.loads(out.read_text()) if out.exists() else {}
        if code:
            result |= {"ok": False, "broke": result.get("broke") or f"ended with {code} within {seconds} s"}
        keep(name, result)

    def lane(parts):
        for part in parts:
            if not only or part[0] in only:
                run(*part)

    for stage in STAGES:
        with concurrent.futures.ThreadPoolExecutor(len(stage)) as pool:
            list(pool.map(lane, stage))
    parts = results["parts"]
    bad = [name for name, result in parts.items() if not result.get("ok")]
    print(f"{len(parts) - len(bad)} of {len(parts)} parts ok" + (f"; not: {', '.join(bad)}" if bad else ""), flush=True)


def machine():
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no NVIDIA device"


if __name__ == "__main__":
    main()
