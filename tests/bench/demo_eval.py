"""Sends the exported held-out requests (deploy/demo/train/export_eval.py) to a running service and compares the answers.

    millrace up --model deploy/demo/model=demo --nats managed &      # logs the NATS address
    target/tools/venv/bin/python tests/bench/demo_eval.py --nats URL --folder DIR --out RESULT.json

clips_200, stills_100: raw frames; every answer must be transformers' own greedy text. mp4_50: the H.264 file itself; ffmpeg decodes and
the service samples; answers are compared with the true caption.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import platform
import uuid
from pathlib import Path

import nats


def frames_of(sample, pixels):
    """Media parts of a sample from its raw pixels."""
    parts, at = [], 0
    for size in sample["media"]:
        length = size["width"] * size["height"] * 3
        raw = {"width": size["width"], "height": size["height"]}
        frames = []
        for _ in range(size["frames"]):
            frames.append({"data": base64.b64encode(pixels[at : at + length]).decode(), "raw": raw})
            at += length
        if sample["kind"] == "video":
            parts.append({"type": "frames", "frames": frames, "fps": sample["fps"], "indices": sample["frame_indices"]})
        else:
            parts.append({"type": "image", **frames[0]})
    return parts


def job_of(folder, sample):
    if "mp4" in sample:
        data = base64.b64encode((folder / sample["mp4"]).read_bytes()).decode()
        media = [{"type": "video", "data": data, "media_type": "video/mp4"}]
    else:
        media = frames_of(sample, (folder / sample["file"]).read_bytes())
    content = [{"type": "text", "text": sample["before"]}] if sample["before"] else []
    content += media
    content += [{"type": "text", "text": sample["after"]}] if sample["after"] else []
    messages = [{"role": "system", "content": sample["system"]}] if sample["system"] else []
    messages.append({"role": "user", "content": content})
    return {"messages": messages, "sampling": {"temperature": 0}, "stream": False}


async def answer(client, stream, model, run, folder, sample):
    job = f"eval-{run}-{sample['id']}"
    out = await stream.subscribe(f"millrace.v1.out.{job}", ordered_consumer=True)
    body = json.dumps(job_of(folder, sample)).encode()
    await stream.publish(f"millrace.v1.jobs.batch.{model}.{job}", body, headers={"Nats-Msg-Id": job})
    while True:
        chunk = json.loads((await out.next_msg(timeout=300)).data)
        if chunk["kind"] == "final":
            await out.unsubscribe()
            return chunk


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--text", default="text_f32", help="which of transformers' answers: text_f32 or text (bfloat16)")
    args = parser.parse_args()
    index = json.loads((args.folder / "index.json").read_text())
    client = await nats.connect(args.nats)
    stream = client.jetstream()
    run, gate = uuid.uuid4().hex[:8], asyncio.Semaphore(16)

    async def one(sample):
        async with gate:
            return await answer(client, stream, args.model, run, args.folder, sample)

    finals = await asyncio.gather(*(one(sample) for sample in index["samples"]))
    await client.close()
    rows = [
        {
            "id": sample["id"],
            "category": sample["category"],
            "same_as_transformers": final["text"] == sample[args.text],
            "exact": final["text"] == sample["caption"],
            "prompt_tokens_agree": final["usage"]["prompt_tokens"] == len(sample["input_ids"]),
            "text": final["text"],
            "transformers": sample[args.text],
            "caption": sample["caption"],
        }
        for sample, final in zip(index["samples"], finals)
    ]
    result = {
        "folder": args.folder.name,
        "machine": platform.processor() or platform.machine(),
        "model_sha256": index["model_sha256"],
        "transformers": index["transformers"],
        "compared_with": args.text,
        "n": len(rows),
        "same_as_transformers": sum(row["same_as_transformers"] for row in rows),
        "exact": sum(row["exact"] for row in rows),
        "prompt_tokens_agree": sum(row["prompt_tokens_agree"] for row in rows),
        "differences": [row for row in rows if not row["same_as_transformers"]],
        "answers_sha256": hashlib.sha256(json.dumps([row["text"] for row in rows]).encode()).hexdigest(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "differences"}, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


asyncio.run(main())
