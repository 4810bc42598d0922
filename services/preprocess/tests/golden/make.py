"""Writes this folder's goldens with the reference: transformers 5.17, torchvision 0.29 on the CPU.

Run: PYTHON services/preprocess/tests/golden/make.py [OUT_FOLDER]        (templates.py beside it writes templates.json)
Inputs are formulas of a seed (`noise`), so that the files hold hashes instead of pixels.
"""

import hashlib
import json
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvf
from torchvision.transforms import InterpolationMode
from transformers import AutoTokenizer, Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_smart_resize
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoMetadata

HERE = pathlib.Path(__file__).parent
OUT = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
DEMO = HERE / "demo"
torch.set_num_threads(1)


def noise(seed, *shape):
    index = np.arange(int(np.prod(shape)), dtype=np.uint32)
    return (((index * np.uint32(2654435761) + np.uint32(seed)) ^ (index >> np.uint32(3))) >> np.uint32(24)).astype(np.uint8).reshape(shape)


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def resized(image, height, width):
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    out = tvf.resize(tensor, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return out.permute(1, 2, 0).contiguous().numpy()


def write(name, value):
    (OUT / name).write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def resize_goldens():
    cases = []
    shapes = [
        (108, 192, 128, 192), (100, 150, 224, 320), (480, 640, 480, 640), (480, 640, 224, 320), (16, 16, 256, 256),
        (33, 600, 32, 608), (500, 400, 64, 32), (97, 31, 32, 96), (1, 7, 32, 64), (1080, 1920, 1088, 1920),
        (1080, 1920, 256, 448), (3, 3, 32, 32), (257, 129, 96, 128), (64, 1200, 32, 64), (720, 1280, 704, 1280),
        (200, 333, 192, 320),
    ]
    for seed, (h, w, oh, ow) in enumerate(shapes):
        image = noise(seed, h, w, 3)
        out = resized(image, oh, ow)
        case = {"seed": seed, "h": h, "w": w, "oh": oh, "ow": ow, "sha256": sha(out)}
        if oh * ow <= 32 * 64:
            case["out_hex"] = out.tobytes().hex()
        cases.append(case)
    write("resize.json", cases)


def processor_goldens():
    demo_image = dict(size={"longest_edge": 36864, "shortest_edge": 9216}, patch_size=16, temporal_patch_size=2, merge_size=2,
                      image_mean=[0.5] * 3, image_std=[0.5] * 3)
    vl_image = dict(demo_image, size={"longest_edge": 16777216, "shortest_edge": 65536})
    clip_image = dict(size={"longest_edge": 28 * 28 * 60, "shortest_edge": 56 * 56})  # class defaults: patch 14, CLIP mean
    images = []
    for seed, (config, h, w) in enumerate([
        (demo_image, 96, 96), (demo_image, 480, 640), (demo_image, 33, 200), (vl_image, 240, 304), (vl_image, 48, 80),
        (vl_image, 512, 768), (clip_image, 120, 200), (vl_image, 1080, 1920),
    ]):
        image = noise(seed + 100, h, w, 3)
        out = Qwen2VLImageProcessor(**config)(images=[torch.from_numpy(image).permute(2, 0, 1)], return_tensors="pt")
        images.append({"seed": seed + 100, "h": h, "w": w, "config": config, "grid": out["image_grid_thw"][0].tolist(),
                       "sha256": sha(out["pixel_values"].numpy()),
                       "bf16_sha256": sha(out["pixel_values"].to(torch.bfloat16).view(torch.int16).numpy())})
    demo_video = dict(size={"longest_edge": 262144, "shortest_edge": 36864}, fps=2, min_frames=4, max_frames=32, cap_pixels_per_frame=False)
    vl_video = dict(size={"longest_edge": 25165824, "shortest_edge": 4096})
    videos = []
    for seed, (config, total, fps, h, w, sample) in enumerate([
        (demo_video, 12, 6.0, 96, 96, True), (demo_video, 5, 2.0, 60, 100, False), (vl_video, 50, 10.0, 64, 96, True),
        (vl_video, 7, 30.0, 90, 50, True), (vl_video, 3, 30.0, 40, 40, True), (demo_video, 9, 4.0, 200, 300, False),
        (dict(vl_video, cap_pixels_per_frame=True, max_video_tokens=4), 6, 2.0, 320, 480, False),
        (vl_video, 4, 2.0, 20, 30, False),
    ]):
        frames = noise(seed + 200, total, h, w, 3)
        processor = Qwen3VLVideoProcessor(**config)
        metadata = VideoMetadata(total_num_frames=total, fps=fps, frames_indices=list(range(total)), width=w, height=h, duration=total / fps)
        indices = processor.sample_frames(metadata).tolist() if sample else list(range(total))
        out = processor(videos=[torch.from_numpy(frames[indices]).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt")
        videos.append({"seed": seed + 200, "total": total, "fps": fps, "h": h, "w": w, "sample": sample, "config": config,
                       "indices": indices, "grid": out["video_grid_thw"][0].tolist(), "sha256": sha(out["pixel_values_videos"].numpy())})
    sizes = []
    rng = np.random.default_rng(0)
    for h, w in [(100, 150), (480, 640), (1080, 1920), (16, 16), (5000, 4000), (33, 6000), (48, 80), (240, 304)] + [
            (int(a), int(b)) for a, b in rng.integers(20, 4000, (40, 2))]:
        sizes.append([h, w, *smart_resize(h, w, 32, 65536, 16777216)])
    video_sizes = []
    for n, h, w in [(10, 64, 96), (20, 1080, 1920), (768, 1080, 1920), (600, 720, 1280), (4, 20, 30), (5, 360, 640)] + [
            (int(n), int(a), int(b)) for n, a, b in zip(rng.integers(2, 800, 40), rng.integers(20, 2200, 40), rng.integers(20, 3900, 40))]:
        if max(h, w) / min(h, w) <= 200:
            video_sizes.append([n, h, w, *video_smart_resize(n, h, w, 2, 32, 4096, 25165824)])
    samples = []
    for total, fps in [(50, 10.0), (300, 30.0), (7, 30.0), (3, 30.0), (1000, 29.97), (99999, 25.0), (61, 23.976), (240, 60.0)]:
        processor = Qwen3VLVideoProcessor(**vl_video)
        samples.append([total, fps, processor.sample_frames(VideoMetadata(total_num_frames=total, fps=fps)).tolist()[:100]])
    times = [0.25, 0.75, 0.35, 0.05, 0.15, 1.25, 2.5, 10.45, 0.5, 1 / 3, 123.95, 59.949999, 0.0, 3599.95]
    write("processors.json", {"images": images, "videos": videos, "sizes": sizes, "video_sizes": video_sizes, "samples": samples,
                              "times": [[t, f"<{t:.1f} seconds>"] for t in times]})


TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather — now & <later>", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Zürich"]}, "days": {"type": "integer", "default": 2},
                                     "scale": {"type": "number", "default": 1.0, "minimum": 1e-7, "maximum": 1e16, "x": 0.1}, "ok": {"default": True, "none": None}},
    "required": ["city"], "empty": {}, "list": []}}}


def conversations():
    call = lambda city: {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
    image, video = {"type": "image"}, {"type": "video"}
    text = lambda t: {"type": "text", "text": t}
    user = lambda c: {"role": "user", "content": c}
    return [
        ([user("Hi")], None, {}),
        ([{"role": "system", "content": "Be brief."}, user("Weather?")], None, {}),
        ([user([image, text("What?"), video])], None, {}),
        ([user([text("a"), image, image, text("b\nc"), image])], None, {}),
        ([user([image, video, image, video])], None, {"add_vision_id": True}),
        ([{"role": "system", "content": "S"}, user("q"),
          {"role": "assistant", "content": "", "tool_calls": [call("Oslo"), call("Rome")]},
          {"role": "tool", "content": "12C"}, {"role": "tool", "content": "13C"}], [TOOL], {}),
        ([user("q")], [TOOL, TOOL], {}),
        ([user("a"), {"role": "assistant", "content": "ans"}, user("b")], None, {}),
        ([user("a"), {"role": "assistant", "content": "x", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": '{"k":"é"}'}}]}, {"role": "tool", "content": "1"}, user("b")], None, {}),
        ([user("日本語 🎉 naïve \u00a0 nbsp e\u0301 combining")], None, {}),
        ([{"role": "system", "content": [text("sys "), text("parts")]}, user([text("hello")])], None, {}),
        ([user("ends with newline\n\n"), {"role": "assistant", "content": "  spaces  "}], None, {"add_generation_prompt": False}),
        ([user("<|im_end|> literal <tool_call> and {{ braces }} {% raw %}")], None, {}),
        ([user(""), {"role": "assistant", "content": [text("p1"), text("p2")]}, user([])], None, {}),
        ([user("q"), {"role": "assistant", "content": "y", "tool_calls": [
            {"name": "g", "arguments": {"k": [1, "é", None, True, 2.5, {"n": "</x> 'q' \"d\""}]}}]}], None, {}),
        ([user([{"type": "text", "text": "tabs\tand  \r\n crlf"}, image])], None, {}),
    ]


# Small templates against jinja2 as transformers sets it up: what real templates use of Python.
SNIPPETS = [
    "{{ t }} {{ f }} {{ n }} {{ x }} {{ i }} {{ lst }} {{ d }}",
    "{{ (t|string) ~ '|' ~ (n|string) ~ '|' ~ (x|string) ~ i }}",
    "{{ d|tojson }}\n{{ d|tojson(ensure_ascii=True) }}\n{{ d|tojson(indent=2) }}\n{{ lst|tojson(separators=(',',':')) }}\n{{ d|tojson(sort_keys=True) }}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d.keys() %}{{ k }},{% endfor %}{{ d.get('a') }} {{ d.get('zz') }} {{ d.get('zz', 5) }}",
    "{{ s.split('x')[0] }}|{{ s.split('x')[-1].lstrip('\\n') }}|{{ s.strip() }}|{{ s.rstrip('\\n').lstrip() }}|{{ s.startswith(' a') }}|{{ s.endswith('b') }}|{{ s.upper() }}",
    "{% set ns = namespace(n=0) %}{% for m in lst[::-1] %}{% set ns.n = ns.n + 1 %}{% if loop.first %}F{% endif %}{{ loop.index0 }}{{ m }}{% if loop.last %}L{% endif %}{% endfor %}{{ ns.n }}",
    "{% for m in lst %}\n    {%- if m == 2 %}{% continue %}{% endif %}\n    {{- m }},\n{% endfor %}\nend\n",
    "{% macro show(a, b='z') %}<{{ a }}{{ b }}>{% endmacro %}{{ show(1) }}{{ show('q', b=t) }}",
    "{% if lst is iterable and lst is not mapping and d is mapping and s is string and zz is not defined and zz is undefined and n is none %}yes{% endif %}{{ lst|length }}{{ d|items|list|length }}",
    "{{ '%s' % 'a' if false else 'b' }}{{ lst|join(', ') }}{{ s|trim }}{{ s|replace('a','A') }}{{ ['a','b']|reject('in', ['a'])|list }}",
    "{% for m in lst %}{{ loop.previtem if loop.previtem is defined else '-' }}{{ loop.nextitem if loop.nextitem is defined else '-' }}{% endfor %}",
    "  {% if t %}\n  kept\n  {% endif %}\n{# gone #}\nx {%- if t -%}   y   {%- endif -%}  z\n\n",
    "{% generation %}inside{% endgeneration %}|{{ zz }}|{{ x|int }}|{{ '5'|int + 1 }}|{{ i // 2 }}|{{ i / 2 }}|{{ i ** 2 }}|{{ [1] + [2] }}",
    "{{ {'a': 1, 'b': [true, none, 'q\\'s', \"d\\\"q\"]} }}|{{ [1, 'a'] }}|{{ 'a' in d }}|{{ 'zz' not in d }}|{{ 'ell' in 'hello' }}",
    "{{ 1e16 }} {{ 1e-5 }} {{ 0.0001 }} {{ 123456789.125 }} {{ 1.0 }} {{ -0.0 }} {{ big|tojson }}",
    "{%- set parts = s.split() %}{{ parts[0] }}{{ parts|length }}{{ 'a,b,,c'.split(',') }}{{ 'a b c'.split(' ', 1) }}{{ 'Title me'.title() }}{{ 'x'.join(['a','b']) }}",
    "{{ t ~ f ~ n ~ x ~ i ~ lst ~ d ~ zz ~ '!' }}|{{ 'a' ~ t if f ~ n else n ~ 'b' }}|{{ ('q' ~ n) + (f ~ '') }}|{{ [t ~ '', n ~ 1] }}|{{ i * 2 ~ -i ~ t is none }}",
    "{% set v = n ~ '-' ~ t -%}{{ v }}{% macro m(a) %}{{ a ~ f }}{% endmacro %}{{ m(n) ~ m(t ~ n) }}{{ d['a'][1] ~ d.c.k ~ lst[0] ~ s[1:3] ~ (d|tojson) }}",
    "{{ n|trim }}|{{ t|upper }}|{{ f|lower }}|{{ n|replace('N', 'n') }}|{{ x|trim }}|{{ t|string|length }}|{{ n|title }}|{{ f|capitalize }}|{{ n|default('d') }}|{{ n|default('d', true) }}",
    "{{ lst|first }}{{ lst|last }}{{ d|length }}{{ lst|sum }}{{ lst|max }}{{ lst|reverse|list }}{{ lst|map('string')|list }}{{ [t, n, 'x']|map('string')|join('-') }}{{ lst|select('odd')|list }}",
    "{{ lst == [1, 2, 3] }}{{ n is none }}{{ t and n }}{{ f or 'x' }}{{ not t }}{{ 1 < 2 }}{{ n == none }}",
    "{{ s|indent(2) }}|{{ n is iterable }}{{ s is iterable }}{{ i is iterable }}{{ zz is iterable }}{{ d is iterable }}{{ n is sequence }}{{ s is sequence }}{{ d is sequence }}{{ t is number }}{{ i is integer }}{{ x is float }}{{ t is boolean }}{{ n is string }}{{ lst is sequence }}|{{ '%s-%d' % ('x', 3) if f else 'no' }}|{{ s.find('x') }}|{{ s.count('x') }}|{{ 'abc'[::-1] }}|{{ 'abc'[-2:] }}|{{ 'a-b'.replace('-', '_') }}|{{ ' x'.lstrip() }}",
    "{% for m in lst %}{% if m == 3 %}{% break %}{% endif %}{{ loop.index ~ loop.last }}{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}{% for m in lst if m > 1 %}{{ loop.index }}{{ loop.length }}{% endfor %}",
]
CONTEXT = {"t": True, "f": False, "n": None, "x": 2.5, "i": 7, "lst": [1, 2, 3], "d": {"b": "é<&>", "a": [1, None, True], "c": {"k": 1.0}}, "s": " ax x\n\nb ",
           "big": [1e16, 1e22, 1e-7, 1.5e300, 12345678901234567, 0.1]}


def prompt_goldens():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    out = []
    for messages, tools, args in conversations():
        kwargs = dict({"add_generation_prompt": True}, **args)
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        out.append({"messages": messages, "tools": tools, "args": args, "text": text, "ids": ids})
    texts = ["", "hello world", " lead", "<0.5 seconds>", "a<|im_end|>b", "Ünïcode ②", "1234567", "x" * 50, "\n\n \t", "'s 'LL don't"]
    plain = [[t, tokenizer(t)["input_ids"]] for t in texts]
    snippets = []
    for template in SNIPPETS:
        rendered, _ = render_jinja_template([[]], chat_template=template, **CONTEXT)
        snippets.append([template, rendered[0]])
    write("prompts.json", {"conversations": out, "plain": plain, "context": CONTEXT, "snippets": snippets})


def prepare_goldens():
    processor = Qwen3VLProcessor.from_pretrained(DEMO)
    cases = []
    image, video = {"type": "image"}, {"type": "video"}
    text = lambda t: {"type": "text", "text": t}
    plans = [
        ([image, text("and"), image, text("then"), video, text("Describe.")], [(1, 96, 96), (2, 200, 150)], [(3, 6, 2.0, 96, 96)]),
        ([video, text("Describe.")], [], [(4, 5, 3.0, 64, 128)]),
        ([video, video], [], [(5, 4, 1.0, 96, 96), (6, 8, 2.0, 48, 48)]),
        ([image], [(7, 40, 600)], []),
    ]
    for content, images, videos in plans:
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        kwargs = {}
        if images:
            kwargs["images"] = [torch.from_numpy(noise(s, h, w, 3)).permute(2, 0, 1) for s, h, w in images]
        if videos:
            kwargs["videos"] = [torch.from_numpy(noise(s, n, h, w, 3)).permute(0, 3, 1, 2) for s, n, _, h, w in videos]
            kwargs["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": [
                {"total_num_frames": n, "fps": fps, "frames_indices": list(range(n)), "width": w, "height": h, "duration": n / fps} for _, n, fps, h, w in videos]}
        out = processor(text=[prompt], return_tensors="pt", **kwargs)
        cases.append({"content": content, "images": images, "videos": videos, "prompt": prompt, "ids": out["input_ids"][0].tolist(),
                      "image_grid": out["image_grid_thw"].tolist() if images else [], "video_grid": out["video_grid_thw"].tolist() if videos else [],
                      "image_sha256": sha(out["pixel_values"].to(torch.bfloat16).view(torch.int16).numpy()) if images else None,
                      "video_sha256": sha(out["pixel_values_videos"].to(torch.bfloat16).view(torch.int16).numpy()) if videos else None})
    write("prepare.json", cases)


resize_goldens()
processor_goldens()
prompt_goldens()
prepare_goldens()
