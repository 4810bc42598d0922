#!/usr/bin/env python3
"""Publishes one captioning job to Millrace and prints the answer as it streams.

    pip install nats-py
    python3 caption.py clip.mp4                       # a clip, an image, or several images
    python3 caption.py photo.png --prompt "What colour is it?"

It uses nothing but the documented message (docs/asyncapi.json): any language with a NATS client can do the same.
Files up to 512 KiB travel inside the job; larger ones go through the media bucket and the job names them.
Exit code: 0 answered, 1 the job failed, 2 nothing could be published.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import mimetypes
import pathlib
import sys
import uuid

import nats
from nats.errors import Error as NatsError
from nats.js.api import ConsumerConfig, DeliverPolicy

INLINE_LIMIT_BYTES = 512 * 1024


def media_bucket(prefix: str) -> str:
    return f"{prefix.upper()}_V1_MEDIA"


async def part(js, prefix: str, path: pathlib.Path) -> dict:
    """The message part that carries `path`: inline, or by reference to the media bucket."""
    media_type = mimetypes.guess_type(path.name)[0] or ""
    kind = "video" if media_type.startswith("video/") else "image"
    data = path.read_bytes()
    if len(data) <= INLINE_LIMIT_BYTES:
        return {"type": kind, "data": base64.b64encode(data).decode(), "media_type": media_type}
    name = "sha256-" + hashlib.sha256(data).hexdigest()
    bucket = await js.object_store(media_bucket(prefix))
    await bucket.put(name, data)
    return {"type": kind, "object": name, "media_type": media_type}


async def caption(args: argparse.Namespace) -> int:
    client = await nats.connect(args.nats, connect_timeout=5, max_reconnect_attempts=3)
    js = client.jetstream()
    root = f"{args.prefix}.v1"
    job_id = args.id or uuid.uuid4().hex
    parts = [await part(js, args.prefix, pathlib.Path(path)) for path in args.files]
    prompt = args.prompt or ("Describe the video." if parts[0]["type"] == "video" else "Describe the image.")
    job = {
        "id": job_id,
        "model": args.model,
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}],
        "sampling": {"temperature": 0},
        "max_tokens": args.max_tokens,
    }

    # Stored when this returns. The id is the idempotency key: publishing it again starts nothing twice.
    await js.publish(
        f"{root}.jobs.interactive.{args.model}.{job_id}",
        json.dumps(job).encode(),
        headers={"Nats-Msg-Id": job_id},
    )

    # The output is a stored log: reading from its first message misses nothing, whenever the reader comes.
    output = await js.subscribe(
        f"{root}.out.{job_id}", ordered_consumer=True, config=ConsumerConfig(deliver_policy=DeliverPolicy.ALL)
    )
    shown = 0
    try:
        async for message in output.messages:
            chunk = json.loads(message.data)
            if chunk["kind"] == "delta":
                print(chunk["text"], end="", flush=True)
                shown += len(chunk["text"])
            elif chunk["kind"] == "final":
                print(chunk["text"][shown:])
                if chunk["status"] == "done":
                    return 0
                error = chunk.get("error") or {}
                print(f"{chunk['status']}: {error.get('code')}: {error.get('message')}", file=sys.stderr)
                return 1
    finally:
        await client.close()
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="a clip, or one or more images")
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="`millrace up` prints its address")
    parser.add_argument("--model", default="demo", help="name under which the model is served")
    parser.add_argument("--prompt", help="default: Describe the video. / Describe the image.")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prefix", default="millrace", help="[nats] prefix of pipeline.toml")
    parser.add_argument("--id", help="the job's id; default: a random one")
    try:
        return asyncio.run(asyncio.wait_for(caption(parser.parse_args()), timeout=600))
    except (NatsError, OSError, asyncio.TimeoutError) as error:
        print(f"cannot publish or read: {error!r}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
