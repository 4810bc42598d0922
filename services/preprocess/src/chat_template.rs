//! The checkpoint's chat template, run the way the reference runs Jinja: trimmed blocks, loop controls, Python's
//! methods and Python's text of values.
//!
//! Known difference, meant: `strftime_now` is UTC, where the reference takes the machine's zone. A prompt must not depend on
//! which machine renders it.

use std::path::Path;

use millrace_protocol::{ErrorCode, JobError};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, context};
use serde_json::Value as Json;

use crate::error::LoadError;
use crate::jinja_source;
use crate::model_files::read_json_if_present;
use crate::python_text::{repr_of, str_of, tojson};
use crate::strftime;

const NAME: &str = "chat";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Whether the template prints string arguments of tool calls as they are.
    takes_text_arguments: bool,
    special_tokens: serde_json::Map<String, Json>,
}

/// What a template is rendered with.
#[derive(Debug, Clone, Copy)]
pub struct TemplateInput<'a> {
    /// Conversation, as the template sees it.
    pub messages: &'a [Json],
    /// Tools, `None` if there are none.
    pub tools: Option<&'a Json>,
    /// Further variables of the job.
    pub args: &'a serde_json::Map<String, Json>,
    /// Wall time for `strftime_now`.
    pub now_unix_ms: u64,
}

impl ChatTemplate {
    /// Loads `chat_template.jinja`, or the template in tokenizer_config.json; `None` if there is neither.
    ///
    /// # Errors
    /// [`LoadError`] if the template cannot be read or compiled.
    pub fn load(folder: &Path) -> Result<Option<Self>, LoadError> {
        let config_path = folder.join("tokenizer_config.json");
        let config: Json = read_json_if_present(&config_path)?.unwrap_or_default();
        let path = folder.join("chat_template.jinja");
        let (path, source) = if path.exists() {
            let source =
                std::fs::read_to_string(&path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
            (path, source)
        } else {
            match config.get("chat_template").and_then(named_default) {
                Some(source) => (config_path, source.to_owned()),
                None => return Ok(None),
            }
        };
        let mut template = Self::compile(&source).map_err(|error| LoadError::content(path, describe(&error)))?;
        for key in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            let token = config.get(key).and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
            if let Some(token) = token {
                template.special_tokens.insert(key.to_owned(), Json::from(token));
            }
        }
        Ok(Some(template))
    }

    /// Compiles a template's text.
    ///
    /// # Errors
    /// minijinja's, with the line.
    pub fn compile(source: &str) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_formatter(write_as_python);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", |value: &Value, kwargs: Kwargs| tojson(value, kwargs));
        environment.add_filter("string", |value: &Value| str_of(value));
        environment.add_filter("join", join);
        // minijinja takes `none` for an empty list, a text for no sequence and a boolean for no number; Python does not.
        environment.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
        environment.add_test("iterable", |value: &Value| value.is_undefined() || python_length(value));
        environment.add_test("sequence", |value: &Value| value.is_undefined() || python_length(value));
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |state: &State<'_, '_>, format: String| {
            let now = state.lookup("__now_unix_ms").and_then(|now| u64::try_from(now).ok()).unwrap_or_default();
            strftime::format(&format, now).ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}) is not supported"))
            })
        });
        environment.add_template_owned(NAME, jinja_source::rewrite(source))?;
        let takes_text_arguments = source.contains("arguments is string") || !source.contains("arguments");
        Ok(Self { environment, takes_text_arguments, special_tokens: serde_json::Map::new() })
    }

    /// Whether tool-call arguments given as JSON text are rendered verbatim; otherwise they must be parsed first.
    pub fn takes_text_arguments(&self) -> bool {
        self.takes_text_arguments
    }

    /// Renders a conversation, ending in the assistant's opening unless `args` sets `add_generation_prompt`.
    ///
    /// # Errors
    /// `template` with the template's own words.
    pub fn render(&self, input: TemplateInput<'_>) -> Result<String, JobError> {
        let refuse = |error: Error| {
            let text = format!(
                "the model's chat template refused the messages: {}; change them accordingly",
                describe(&error)
            );
            JobError::new(ErrorCode::Template, text)
        };
        let template = self.environment.get_template(NAME).map_err(refuse)?;
        let fixed = context! {
            messages => Value::from_serialize(input.messages),
            tools => input.tools.map(Value::from_serialize).unwrap_or(Value::from(())),
            documents => Value::from(()),
            __now_unix_ms => input.now_unix_ms,
        };
        // Earlier sources win: the job may set anything but the conversation.
        let variables = context! {
            ..fixed,
            ..Value::from_serialize(input.args),
            ..Value::from_serialize(&self.special_tokens),
            ..context! { add_generation_prompt => true }
        };
        template.render(variables).map_err(refuse)
    }
}

/// A template text, or the one called `default` of a list of named ones.
fn named_default(value: &Json) -> Option<&str> {
    match value {
        Json::String(text) => Some(text),
        Json::Array(list) => list.iter().find(|entry| entry["name"] == "default")?["template"].as_str(),
        _ => None,
    }
}

fn write_as_python(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Undefined => return Ok(()),
        ValueKind::String => return out.write_str(value.as_str().unwrap_or_default()).map_err(Error::from),
        _ => repr_of(value),
    };
    out.write_str(&text).map_err(Error::from)
}

/// Whether Python can walk the value: texts, lists and mappings, not numbers and not `None`.
fn python_length(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Bytes)
}

fn join(list: &Value, separator: Option<String>) -> Result<String, Error> {
    let items: Vec<String> = list.try_iter()?.map(|item| str_of(&item)).collect();
    Ok(items.join(separator.as_deref().unwrap_or_default()))
}

/// The innermost cause and its line.
fn describe(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    error.line().map_or_else(|| detail.clone(), |line| format!("{detail} (line {line} of the template)"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, args: Json) -> Result<String, JobError> {
        let Json::Object(args) = args else { panic!("not an object") };
        ChatTemplate::compile(source).unwrap().render(TemplateInput {
            messages: &[],
            tools: None,
            args: &args,
            now_unix_ms: 0,
        })
    }

    #[test]
    fn the_template_can_refuse() {
        let error = render("{{ raise_exception('No user query found.') }}", json!({})).unwrap_err();
        assert_eq!(error.code, ErrorCode::Template);
        assert!(error.message.contains("No user query found."), "{error}");
    }

    #[test]
    fn the_job_cannot_replace_the_conversation() {
        assert_eq!(
            render("{{ messages|length }}{{ tools }}", json!({"messages": [1], "tools": [1]})).unwrap(),
            "0None"
        );
    }

    #[test]
    fn time_comes_from_the_caller() {
        assert_eq!(render("{{ strftime_now('%Y-%m-%d') }}", json!({})).unwrap(), "1970-01-01");
    }

    #[test]
    fn a_broken_template_is_named_with_its_line() {
        let error = ChatTemplate::compile("a\n{% if %}").err().map(|error| describe(&error)).unwrap();
        assert!(error.contains("line 2"), "{error}");
    }
}
