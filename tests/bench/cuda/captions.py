"""The demo checkpoint's held-out requests through NATS on two devices: 200 clips, and stills with several images in a request.
The captions must be the same on at least 99 % of them.

    python3 captions.py --tools DIR --out OUT.json [--device cuda:0]

Requests come from the generator (deploy/demo/train, evaluate.make_sample): the same clips as export_eval.py's clips_200.
"""

import asyncio
import base64
import sys

from service import ROOT, Client, Process, configuration, part, scratch

sys.path.insert(0, str(ROOT / "deploy/demo/train"))
PLANS = {"clips_200": {"clips": 180, "over_16_frames": 20},
         "stills_100": {"stills": 40, "long_prompt_stills": 20, "two_images": 20, "three_images": 10, "other_sizes": 10}}
SHARE = 0.99


def job_of(sample):
    parts = []
    for media in sample.media:
        raw = {"width": media.shape[2], "height": media.shape[1]}
        frames = [{"data": base64.b64encode(frame.tobytes()).decode(), "raw": raw} for frame in media]
        if sample.video:
            parts.append({"type": "frames", "frames": frames, "fps": sample.fps, "indices": [int(i) for i in sample.indices]})
        else:
            parts.append({"type": "image", **frames[0]})
    before, after = ([{"type": "text", "text": text}] if text else [] for text in (sample.prompt.before, sample.prompt.after))
    messages = [{"role": "system", "content": sample.prompt.system}] if sample.prompt.system else []
    messages.append({"role": "user", "content": before + parts + after})
    return {"messages": messages, "sampling": {"temperature": 0}, "stream": False}


async def answers(url, jobs):
    client, gate = await Client.connect(url), asyncio.Semaphore(48)

    async def one(name, body):
        async with gate:
            await client.publish(name, body)
            return await client.final(name, 240)

    finals = await asyncio.gather(*(one(f"eval-{n}", body) for n, body in enumerate(jobs)))
    await client.connection.close()
    return finals


def run(options):
    from evaluate import make_sample

    plans = {name: {c: max(1, k // 20) for c, k in plan.items()} for name, plan in PLANS.items()} if options.quick else PLANS
    folder = scratch("captions")
    # Rehearsed without a card, bf16 on the CPU stands for the other device.
    here = Process(options, "up", configuration(folder / "a", "cpu"))
    there = Process(options, "up", configuration(folder / "b", options.device, dtype="bf16"))
    try:
        samples = {name: [make_sample(c, n) for c, k in plan.items() for n in range(k)] for name, plan in plans.items()}
        jobs = [job_of(sample) for plan in samples.values() for sample in plan]
        captions = [sample.caption for plan in samples.values() for sample in plan]
        print(f"{len(jobs)} requests", flush=True)
        urls = [process.wait_ready().nats for process in (here, there)]

        async def both():
            return await asyncio.gather(*(answers(url, jobs) for url in urls))

        cpu, device = asyncio.run(both())
    finally:
        here.stop(), there.stop()
    result, at = {"ok": True}, 0
    for name, plan in samples.items():
        span = range(at, at + len(plan))
        at += len(plan)
        done = sum(cpu[n]["status"] == device[n]["status"] == "done" for n in span)
        same = sum(cpu[n]["text"] == device[n]["text"] for n in span if cpu[n]["status"] == "done")
        row = {"n": len(plan), "done_on_both": done, "same": same, "share": same / len(plan),
               "true_on_cpu": sum(cpu[n]["text"] == captions[n] for n in span), "true_on_device": sum(device[n]["text"] == captions[n] for n in span)}
        row["ok"] = done == len(plan) and row["share"] >= SHARE
        row["differences"] = [{"id": n, "cpu": cpu[n]["text"], "device": device[n]["text"], "caption": captions[n]}
                              for n in span if cpu[n]["text"] != device[n]["text"]][:10]
        failed = [final["error"] for n in span for final in (cpu[n], device[n]) if final["status"] != "done"]
        row["failed"] = failed[:5]
        result[name] = row
        result["ok"] &= row["ok"]
        print(name, {key: value for key, value in row.items() if key != "differences"}, flush=True)
    result["devices"] = ["cpu f32", f"{options.device} bf16"]
    return result


if __name__ == "__main__":
    part(__doc__, run)
