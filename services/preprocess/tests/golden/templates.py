"""Writes templates.json: conversations of every kind through the chat templates of all four families, as transformers 5.17
renders them.

Run: PYTHON services/preprocess/tests/golden/templates.py [OUT_FILE]

The templates of Qwen3-VL (the demo checkpoint's) and three of our own in templates/, which do what models.md 5.4 to 5.6 says of the
official ones with the same means: the official texts belong to their checkpoints, and the service runs what it finds there.
"""

import json
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
OUT = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "templates.json"
DEMO = HERE / "demo"
FAMILIES = {
    "qwen3": HERE / "templates/qwen3.jinja",
    "qwen3_moe": HERE / "templates/qwen3_coder.jinja",
    "glm4_moe_lite": HERE / "templates/glm4_moe_lite.jinja",
    "qwen3_vl": DEMO / "chat_template.jinja",
}

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "  Weather — now & <later>\n",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "Name of the city ", "enum": ["Oslo", "Zürich", "東京"]},
        "days": {"type": ["integer", "null"], "default": None, "minimum": 1, "max-value": 14},
        "exact": {"type": "boolean", "default": True, "$comment": False},
        "near": {"type": "object", "properties": {"lat": {"type": "number", "default": 59.91}}, "required": ["lat", 2]},
        "scale": {"type": "number", "default": 1e-7, "maximum": 1e16, "with space": [1, 2.5, "x", None, True]}}}}}
CLOCK = {"type": "function", "function": {
    "name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}},
    "return": {"type": "string"}}}
BARE = {"name": "bare", "description": None, "parameters": {"type": "object", "properties": {"a": {}}, "required": []}, "return": 7}


def say(role, content, **more):
    return dict(role=role, content=content, **more)


def call(name, **arguments):
    return {"type": "function", "id": "call-1", "function": {"name": name, "arguments": arguments}}


def text(words):
    return {"type": "text", "text": words}


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
ODD = {"k": [1, "é", None, True, 2.5, {"n": "</x> 'q' \"d\"\n"}], "none": None, "no": False, "zero": 0, "float": 1.0, "text": " x ", "empty": {}, "list": []}


def shared():
    """What every template takes: text alone."""
    turn = [say("user", "q"), say("assistant", "", tool_calls=[call("get_weather", city="Oslo", days=2)])]
    return [
        ("hello", [say("user", "Hi")], None, {}),
        ("system", [say("system", "Be brief."), say("user", "Weather?")], None, {}),
        ("no generation prompt", [say("user", "a"), say("assistant", "b")], None, {"add_generation_prompt": False}),
        ("turns", [say("user", "a"), say("assistant", "ans"), say("user", "b"), say("assistant", " padded \n"), say("user", "c")], None, {}),
        ("later system", [say("system", "S"), say("user", "a"), say("system", "T"), say("user", "b")], None, {}),
        ("unicode", [say("system", "§ 日本語"), say("user", "naïve \u00a0 e\u0301 \U0001F389 \u202e \ufeff tail")], None, {}),
        ("looks like a template", [say("user", "{{ braces }} {% raw %} {# no #} <|im_end|> </think> <tool_call>")], None, {}),
        ("white space", [say("system", "\n s \n"), say("user", "\ttabs \r\n crlf\n\n"), say("assistant", "\n\nx\n\n"), say("user", "")], None, {}),
        ("tools", [say("user", "q")], [WEATHER], {}),
        ("tools and system", [say("system", "S"), say("user", "q")], [WEATHER, CLOCK], {}),
        ("one call", turn + [say("tool", "12C")], [WEATHER], {}),
        ("two calls, two answers", [say("user", "q"), say("assistant", "I look.", tool_calls=[call("get_weather", city="Oslo"), call("clock")]),
                                    say("tool", "12C"), say("tool", "13:00"), say("assistant", "Done."), say("user", "b")], [WEATHER, CLOCK], {}),
        ("arguments of every kind", [say("user", "q"), say("assistant", "y", tool_calls=[{"name": "g", "arguments": ODD}])], None, {}),
        ("answers apart", turn + [say("tool", "1"), say("user", "next"), say("assistant", "", tool_calls=[call("clock")]), say("tool", "2")], [CLOCK], {}),
        ("a bare tool", [say("user", "q")], [BARE], {}),
    ]


def thinking():
    """GLM: reasoning is shown or dropped."""
    history = [say("user", "a"), say("assistant", "ans", reasoning_content=" because \n"), say("user", "b")]
    inline = [say("user", "a"), say("assistant", "<think>\nwhy\n</think>\n\nans"), say("user", "b")]
    step = [say("user", "q"), say("assistant", "", reasoning_content="need tool", tool_calls=[call("get_weather", city="Oslo", days=2)])]
    return [
        ("thinking off", [say("user", "Hi")], None, {"enable_thinking": False}),
        ("thinking on", [say("user", "Hi")], None, {"enable_thinking": True}),
        ("old reasoning is dropped", history, None, {}),
        ("old reasoning is kept", history, None, {"clear_thinking": False}),
        ("clear_thinking on", history, None, {"clear_thinking": True}),
        ("inline reasoning is dropped", inline, None, {}),
        ("inline reasoning is kept", inline, None, {"clear_thinking": False}),
        ("reasoning of this turn", step + [say("tool", "12C"), say("tool", "13C")], None, {}),
        ("parts", [say("system", [text("a"), text("b")]), say("user", [text("c"), IMAGE, "plain", text("d")])], None, {}),
        ("answers as a list", step + [say("tool", [{"output": "12C"}, {"temperature": 12.5, "rain": None}])], None, {}),
        ("content null", [say("user", "q"), say("assistant", None, tool_calls=[call("clock")])], None, {}),
    ]


def seeing():
    """Qwen3-VL: media parts."""
    return [
        ("image and video", [say("user", [IMAGE, text("What?"), VIDEO])], None, {}),
        ("numbered", [say("user", [IMAGE, text("a"), VIDEO, IMAGE]), say("assistant", [text("p1"), text("p2")]), say("user", [VIDEO])], None, {"add_vision_id": True}),
        ("not numbered", [say("user", [IMAGE, VIDEO])], None, {"add_vision_id": False}),
        ("media in a tool's answer", [say("user", "q"), say("assistant", "", tool_calls=[call("clock")]), say("tool", [text("see"), IMAGE]), say("tool", [VIDEO])], None, {}),
        ("system parts", [say("system", [text("sys "), text("parts")]), say("user", [text("hello")])], [CLOCK], {}),
        ("nothing", [say("user", []), say("assistant", []), say("user", [text("")])], None, {}),
        ("text arguments", [say("user", "a"), say("assistant", "x", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": '{"k":"é"}'}}])], None, {}),
    ]


OWN = {"qwen3": [
    ("text arguments", [say("user", "a"), say("assistant", "x", tool_calls=[{"function": {"name": "f", "arguments": '{"k":"é"}'}}])], None, {}),
    ("lists print nothing", [say("user", [text("lost")]), say("assistant", None)], None, {}),
], "qwen3_moe": [
    ("blank content with calls", [say("user", "a"), say("assistant", " \n ", tool_calls=[call("clock"), call("get_weather", city="é")])], None, {}),
    ("a call without arguments", [say("user", "a"), say("assistant", "x", tool_calls=[{"name": "f"}])], None, {}),
], "glm4_moe_lite": thinking(), "qwen3_vl": seeing()}


def main():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    cases = []
    for family, path in FAMILIES.items():
        template = path.read_text(encoding="utf-8")
        for name, messages, tools, args in shared() + OWN[family]:
            kwargs = {"add_generation_prompt": True} | args
            case = {"family": family, "name": name, "messages": messages, "tools": tools, "args": args}
            case["text"] = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False, **kwargs)
            cases.append(case)
    OUT.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(len(cases), "conversations")


main()
