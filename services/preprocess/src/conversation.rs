//! A job's messages in the form that chat templates read: the wire's fields back as JSON, media as bare markers.

use millrace_protocol::{Content, Message, Part};
use serde_json::{Map, Value, json};

/// How a template wants its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    /// The template takes lists of parts. Templates of text-only models print nothing for a list, so their parts are
    /// joined instead of being lost.
    pub(crate) parts: bool,
    /// The template prints string arguments of tool calls verbatim; others expect an object, so strings are parsed.
    pub(crate) text_arguments: bool,
}

/// Messages as the template sees them.
pub(crate) fn messages(messages: &[Message], form: Form) -> Vec<Value> {
    messages.iter().map(|message| one(message, form)).collect()
}

fn one(message: &Message, form: Form) -> Value {
    let mut out = Map::new();
    out.insert("role".to_owned(), Value::from(message.role.as_str()));
    out.insert("content".to_owned(), content(&message.content, form));
    for (key, value) in &message.extra {
        let mut value = value.clone();
        if key == "tool_calls" && !form.text_arguments {
            parse_arguments(&mut value);
        }
        out.insert(key.clone(), value);
    }
    Value::Object(out)
}

fn content(content: &Content, form: Form) -> Value {
    match content {
        Content::Text(text) => Value::from(text.as_str()),
        // Templates print `None` for it; a turn of tool calls alone has no text.
        Content::Null(()) => Value::from(""),
        Content::Parts(parts) if form.parts => parts.iter().map(part).collect(),
        Content::Parts(parts) => {
            let texts =
                parts.iter().filter_map(|part| if let Part::Text { text } = part { Some(text.as_str()) } else { None });
            Value::from(texts.collect::<String>())
        }
    }
}

fn part(part: &Part) -> Value {
    match part {
        Part::Text { text } => json!({"type": "text", "text": text}),
        Part::Image { .. } => json!({"type": "image"}),
        Part::Video { .. } | Part::Frames { .. } => json!({"type": "video"}),
    }
}

/// Replaces JSON text in `function.arguments` (or `arguments`) by its object; other text stays.
fn parse_arguments(calls: &mut Value) {
    for call in calls.as_array_mut().into_iter().flatten() {
        let inner = if call.get("function").is_some() { &mut call["function"] } else { call };
        let Some(arguments) = inner.get_mut("arguments") else { continue };
        if let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok())
        {
            *arguments = Value::Object(parsed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Message {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn media_become_markers_and_extras_stay() {
        let message = read(
            r#"{"role":"user","name":"n","content":[{"type":"image","data":"AAAA"},{"type":"text","text":"t"},
            {"type":"frames","fps":1,"frames":[]}]}"#,
        );
        let seeing = Form { parts: true, text_arguments: true };
        let expected = json!({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "t"}, {"type": "video"}], "name": "n"});
        assert_eq!(messages(std::slice::from_ref(&message), seeing), [expected]);
        let reading = Form { parts: false, text_arguments: true };
        assert_eq!(messages(&[message], reading)[0]["content"], "t");
    }

    #[test]
    fn arguments_are_parsed_for_templates_that_walk_them() {
        let message = read(
            r#"{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":"{\"a\": 1}"}},
            {"name":"g","arguments":"not json"}]}"#,
        );
        let out =
            |text_arguments| messages(std::slice::from_ref(&message), Form { parts: true, text_arguments })[0].clone();
        assert_eq!(out(true)["tool_calls"][0]["function"]["arguments"], "{\"a\": 1}");
        assert_eq!(out(false)["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
        assert_eq!(out(false)["tool_calls"][1]["arguments"], "not json");
        assert_eq!(out(true)["content"], "");
    }
}
