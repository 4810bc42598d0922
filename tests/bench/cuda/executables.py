"""The test executables that were carried, on the card: every op against its CPU twin, recorded steps, a kernel that traps, the
golden fixtures of the models; and the ops under compute-sanitizer.

    python3 executables.py --tools DIR --out OUT.json tests|sanitizer
"""

import concurrent.futures
import re
import shutil
import subprocess

from service import ROOT, environment, part

TESTS = ("cuda_ops", "cuda_steps", "cuda_fault", "cuda_memory", "cuda_engine", "card")
# A tool's word for each finding; racecheck counts hazards, memcheck errors.
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
# Tests that racecheck does not see, since its host memory grows with their recorded steps (96 GB in 35 s), and the tests of the same
# with fewer steps that it sees instead.
FEWER_STEPS = {
    "recorded_steps_give_the_same_bits": "a_few_recorded_steps_give_the_same_bits",
    "two_steps_under_way_give_the_tokens_of_one": "a_few_steps_two_under_way_give_the_tokens_of_one",
}


def executed(options, command, seconds):
    """(code, output); 124 if it ran out of time."""
    try:
        ran = subprocess.run(command, cwd=ROOT, env=environment(options, RUST_BACKTRACE="0"), text=True, timeout=seconds,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return ran.returncode, ran.stdout
    except subprocess.TimeoutExpired as late:
        return 124, (late.stdout or b"").decode(errors="replace") if isinstance(late.stdout, bytes) else (late.stdout or "")


def run_tests(options):
    """Each executable; without a card all must say that they skip."""
    result = {"ok": True}
    for name in TESTS:
        code, text = executed(options, [str(options.tools / name), "--nocapture", "--test-threads=4"], 150)
        last = [line for line in text.splitlines() if line.startswith("test result")]
        skipped = text.count("skipped:")
        panics = [line for line in text.splitlines() if "panicked at" in line or line.startswith("test ") and "FAILED" in line]
        good = code == 0 and (skipped == 0 if options.cuda else True)
        row = {"code": code, "skipped": skipped, "says": last[-1:], "ok": good}
        if name == "cuda_fault":
            row["device_said"] = [line for line in text.splitlines() if "the device failed" in line][:3]
        if name == "card":
            row["lines"] = [line for line in text.splitlines() if "greedy tokens decided" in line or "not supported" in line]
        if not good:
            row |= {"panics": panics[:10], "tail": text[-3000:]}
        result[name] = row
        result["ok"] &= good
        print(name, row["says"], "ok" if good else "FAILED", flush=True)
    return result


def names(options, executable):
    _, text = executed(options, [str(options.tools / executable), "--list"], 30)
    return [line.removesuffix(": test") for line in text.splitlines() if line.endswith(": test")]


def one(options, tool, executable, test, program):
    command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "5"] if program else []
    command += [str(options.tools / executable), "--exact", test, "--test-threads=1", "--nocapture"]
    code, text = executed(options, command, 100)
    found = [int(a or b) for a, b in SUMMARY.findall(text)]
    row = {"tool": tool, "test": f"{executable}::{test}", "code": code, "found": sum(found) if found else None}
    # Time run out with nothing found is no verdict.
    clean = code == 0 and found and not sum(found) and "skipped:" not in text
    row["verdict"] = "clean" if clean else "out of time" if code == 124 else "no verdict" if not program else "FAILED"
    if row["verdict"] == "FAILED":
        row["tail"] = "\n".join(line for line in text.splitlines() if line.startswith("=========") or "panicked" in line)[:2500]
    return row


def run_sanitizer(options):
    """Every test of cuda_ops and cuda_steps under memcheck and racecheck, but for racecheck those of `FEWER_STEPS`; several processes
    at once. Ok if every one is clean: a tool that dies or runs out of time has said nothing."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if options.cuda and not program:
        return {"ok": False, "broke": "no compute-sanitizer"}
    tests = {executable: names(options, executable) for executable in ("cuda_steps", "cuda_ops")}
    instead = {test for test, fewer in FEWER_STEPS.items() if fewer in tests["cuda_steps"]}
    jobs = [(tool, executable, test) for executable, own in tests.items() for test in own for tool in ("memcheck", "racecheck")
            if tool == "memcheck" or test not in instead]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        rows = list(pool.map(lambda job: one(options, *job, program if options.cuda else None), jobs))
    verdicts = {}
    for row in rows:
        verdicts[row["verdict"]] = verdicts.get(row["verdict"], 0) + 1
        print(row["tool"], row["test"], row["verdict"], flush=True)
    return {"racecheck_sees_fewer_steps_of": sorted(instead),
            "ok": bool(rows) and (verdicts.get("clean", 0) == len(rows) if options.cuda else "FAILED" not in verdicts),
            "verdicts": verdicts, "rows": rows}


def run(options):
    return run_sanitizer(options) if options.what == ["sanitizer"] else run_tests(options)


if __name__ == "__main__":
    part(__doc__, run)
