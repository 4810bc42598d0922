"""Millrace processes and a client of theirs for the parts of faithfulness.py: start with a configuration, publish, await, look."""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "deploy/demo/model"


def part(description, run):
    """The command line that every part has; `run(options)` gives a JSON object with `ok`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder of carried executables (build.sh)")
    parser.add_argument("--device", default="cuda:0", help="cuda:0, or cpu to rehearse without a card")
    parser.add_argument("--out", type=Path, required=True, help="where the result goes, as JSON")
    parser.add_argument("--quick", action="store_true", help="smaller: for rehearsals")
    parser.add_argument("what", nargs="*")
    options = parser.parse_args()
    options.tools = options.tools.resolve()
    options.cuda = options.device != "cpu"
    sys.path.insert(0, str(options.tools))  # nats-py
    begun = time.monotonic()
    try:
        result = run(options)
    except Exception as error:  # noqa: BLE001 - a part that breaks is a result too
        import traceback

        traceback.print_exc()
        result = {"ok": False, "broke": f"{type(error).__name__}: {error}"}
    result["seconds"] = round(time.monotonic() - begun, 1)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result)[:2000], flush=True)


def environment(options, **more):
    """Environment of a millrace process: the carried server, the device libraries, and `more`."""
    made = {**os.environ, "MILLRACE_NATS_SERVER": str(options.tools / "nats-server"), **more}
    made.pop("MILLRACE_CONFIG", None)
    return made


def configuration(folder, device, nats="managed", dtype="auto", model=MODEL, kv="512MiB", storage="file"):
    """Writes pipeline.toml. Processes that share a card must not take all of it: `kv`, unless that is what is tried ("auto")."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pipeline.toml"
    path.write_text(f"""
[nats]
url = "{nats}"
store_dir = "{folder}/nats"
max_payload = "32MiB"
[streams]
storage = "{storage}"
job_max_bytes = "24MiB"
jobs_max_messages = 200000
out_max_bytes = "4GiB"
ack_wait = "5s"
[[models]]
name = "demo"
path = "{model}"
default = true
[preprocess]
credits_batch = 512
credits_interactive = 512
patches = "{"normalised" if device == "cpu" else "bytes"}"
[pager]
dir = "{folder}/pages"
[scheduler]
max_sequences = 256
waiting = 512
[executor]
device = "{device}"
dtype = "{dtype}"
slots = 256
kv_bytes = "{kv}"
[telemetry]
listen = "127.0.0.1:0"
log_format = "json"
""")
    return path


class Process:
    """A millrace process that serves. Its log is kept."""

    def __init__(self, options, command, config, **more):
        self.command = command
        arguments = [str(options.tools / "millrace"), command, "--config", str(config)]
        self.child = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT,
                                      env=environment(options, **more), start_new_session=True)
        self.log, self.fields, self.ready = [], {}, threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.child.stderr:
            self.log.append(line.rstrip())
            try:
                record = json.loads(line)
            except ValueError:
                continue
            record |= record.get("fields", {})
            if record.get("message") == "ready":
                self.fields = record
                self.ready.set()
        self.ready.set()

    def wait_ready(self, seconds=120):
        self.ready.wait(seconds)
        if not self.fields:
            raise RuntimeError(f"{self.command} did not get ready: " + "\n".join(self.log[-8:]))
        return self

    @property
    def nats(self):
        return self.fields["nats"]

    def metrics(self):
        """All samples by name with labels."""
        text = urllib.request.urlopen(f"http://{self.fields['admin']}/metrics", timeout=10).read().decode()
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    def memory_bytes(self):
        """Resident memory of the process."""
        text = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text).group(1)) * 1024

    def kill(self):
        self.child.kill()
        self.child.wait()
        self._end_group()

    def stop(self, seconds=40):
        """SIGTERM; the exit code."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        self.reader.join(5)
        self._end_group()
        return self.child.returncode

    def _end_group(self):
        """Its nats-server too, if it was ended before it could."""
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def wait_end(self, seconds):
        """The exit code, None if it goes on."""
        try:
            self.child.wait(seconds)
            self.reader.join(5)
        except subprocess.TimeoutExpired:
            return None
        return self.child.returncode


class Client:
    """Publishes jobs and gathers what comes out, every chunk."""

    def __init__(self, connection):
        self.connection, self.stream = connection, connection.jetstream()
        self.chunks, self.finals = {}, {}

    @classmethod
    async def connect(cls, url):
        import nats

        self = cls(await nats.connect(url, pending_size=64 << 20))
        # Out of the stream: a plain subscription would also hear writes that the stream refused.
        await self.stream.subscribe("millrace.v1.out.>", cb=self._heard, ordered_consumer=True, pending_bytes_limit=1 << 30,
                                    pending_msgs_limit=1 << 20)
        return self

    async def _heard(self, message):
        job = message.subject.rsplit(".", 1)[-1]
        if job not in self.finals:
            return
        chunk = json.loads(message.data)
        self.chunks[job].append(chunk)
        if chunk.get("kind") == "final" and not self.finals[job].done():
            self.finals[job].set_result(chunk)

    async def publish(self, job, body, kind="batch"):
        self.chunks[job] = []
        self.finals[job] = asyncio.get_running_loop().create_future()
        subject = f"millrace.v1.jobs.{kind}.demo.{job}"
        await self.stream.publish(subject, json.dumps(body).encode(), headers={"Nats-Msg-Id": job}, timeout=30)

    async def final(self, job, seconds=120):
        return await asyncio.wait_for(asyncio.shield(self.finals[job]), seconds)

    def shown(self, job):
        """Tokens shown by deltas, in order."""
        return [token for chunk in self.chunks[job] if chunk.get("kind") == "delta" for token in chunk.get("token_ids", [])]


def words(index, count, low=20, span=900):
    """Token ids of a prompt without special tokens."""
    return [low + (index * 131 + place * 7 + index // 977) % span for place in range(count)]


def scratch(name):
    """A folder for one part's files; the machine's disk."""
    return Path(tempfile.mkdtemp(prefix=f"faith-{name}-"))
