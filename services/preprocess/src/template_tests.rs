//! Chat templates of all four families against transformers 5.17 (`tests/golden/templates.py`) and the brief's own goldens.

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use crate::chat_template::{ChatTemplate, TemplateInput};
use crate::golden_tests::golden;

const FAMILIES: [&str; 4] = ["qwen3", "qwen3_moe", "glm4_moe_lite", "qwen3_vl"];

fn template(family: &str) -> ChatTemplate {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let path: PathBuf = match family {
        "qwen3_vl" => folder.join("demo/chat_template.jinja"),
        "qwen3_moe" => folder.join("templates/qwen3_coder.jinja"),
        family => folder.join(format!("templates/{family}.jinja")),
    };
    ChatTemplate::compile(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn render(family: &str, messages: &Json, tools: &Json, args: &Json) -> Result<String, String> {
    let input = TemplateInput {
        messages: messages.as_array().unwrap(),
        tools: Some(tools).filter(|tools| !tools.is_null()),
        args: args.as_object().unwrap(),
        now_unix_ms: 0,
    };
    template(family).render(input).map_err(|error| error.to_string())
}

#[test]
fn every_conversation_renders_as_in_transformers() {
    let golden = golden("templates.json");
    let cases = golden.as_array().unwrap();
    let mut wrong = Vec::new();
    for case in cases {
        let got = render(case["family"].as_str().unwrap(), &case["messages"], &case["tools"], &case["args"]);
        if got.as_deref() != Ok(case["text"].as_str().unwrap()) {
            wrong.push(format!("{} {}\n  got  {got:?}\n  want {:?}", case["family"], case["name"], case["text"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    for family in FAMILIES {
        let own = cases.iter().filter(|case| case["family"] == family).count();
        assert!(own >= 15, "{own} conversations of {family}");
    }
}

/// models.md 5.6 and 5.7, word for word.
#[test]
fn the_goldens_of_the_brief() {
    let user = |text: &str| json!({"role": "user", "content": text});
    let call = |arguments: Json| json!({"function": {"name": "get_weather", "arguments": arguments}});
    let weather = json!([{"function": {"name": "f", "arguments": {}}}, {"function": {"name": "g", "arguments": {"k": [1, "é"]}}}]);
    let glm = [
        (
            json!([{"role": "system", "content": "Be brief."}, user("Weather?")]),
            "[gMASK]<sop><|system|>Be brief.<|user|>Weather?<|assistant|><think>",
        ),
        (
            json!([user("a"), {"role": "assistant", "content": "ans"}, user("b")]),
            "[gMASK]<sop><|user|>a<|assistant|></think>ans<|user|>b<|assistant|><think>",
        ),
        (
            json!([user("q"), {"role": "assistant", "content": "x", "tool_calls": weather}]),
            "[gMASK]<sop><|user|>q<|assistant|></think>x<tool_call>f</tool_call><tool_call>g<arg_key>k</arg_key><arg_value>[1, \"é\"]</arg_value></tool_call><|assistant|><think>",
        ),
        (
            json!([
                user("q"),
                {"role": "assistant", "content": "", "reasoning_content": "need tool",
                 "tool_calls": [call(json!({"city": "Oslo", "days": 2}))]},
                {"role": "tool", "content": "12C"},
                {"role": "tool", "content": "13C"},
            ]),
            "[gMASK]<sop><|user|>q<|assistant|><think>need tool</think><tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value><arg_key>days</arg_key><arg_value>2</arg_value></tool_call><|observation|><tool_response>12C</tool_response><tool_response>13C</tool_response><|assistant|><think>",
        ),
    ];
    for (messages, text) in glm {
        assert_eq!(render("glm4_moe_lite", &messages, &Json::Null, &json!({})).as_deref(), Ok(text));
    }
    let (image, video) = (json!({"type": "image"}), json!({"type": "video"}));
    let seen = json!([{"role": "user", "content": [image, {"type": "text", "text": "What?"}, video]}]);
    let text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(render("qwen3_vl", &seen, &Json::Null, &json!({})).as_deref(), Ok(text));
    let tools = json!([
        {"role": "system", "content": "S"},
        user("q"),
        {"role": "assistant", "content": "", "tool_calls": [call(json!({"city": "Oslo"})), call(json!({"city": "Rome"}))]},
        {"role": "tool", "content": "12C"},
        {"role": "tool", "content": "13C"},
    ]);
    let end = "</tool_call><|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n12C\n</tool_response>\n<tool_response>\n13C\n</tool_response><|im_end|>\n<|im_start|>assistant\n";
    // Qwen3's text is the same for what holds no media (models.md 5.4).
    for family in ["qwen3_vl", "qwen3"] {
        let got = render(family, &tools, &json!([{"type": "function"}]), &json!({})).unwrap();
        assert!(got.starts_with("<|im_start|>system\nS\n\n# Tools\n\nYou may call"), "{got}");
        assert!(got.ends_with(end), "{family}: {got}");
    }
}

#[test]
fn a_template_that_cannot_place_a_role_refuses_it() {
    let messages = json!([{"role": "narrator", "content": "x"}]);
    let error = render("qwen3", &messages, &Json::Null, &json!({})).unwrap_err();
    assert!(error.contains("narrator") && error.contains("chat template refused"), "{error}");
}
