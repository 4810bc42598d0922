//! A tokenizer and a chat template for checkpoints of random weights, where the config comes without them: one token for
//! each byte, the special tokens that config.json names under their ids, and a template in ChatML.

use std::path::Path;

use serde_json::{Value, json};

/// Files it writes.
const TOKENIZER: &str = "tokenizer.json";
const TEMPLATE: &str = "chat_template.jinja";

/// ChatML with media in the order of the parts.
const CHATML: &str = "{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
";

/// Writes the files into `folder` if it has no tokenizer; whether it did. Reads the folder's config.json.
///
/// # Errors
/// A config.json that cannot be read, files that cannot be written.
pub fn write_stand_in(folder: &Path) -> anyhow::Result<bool> {
    if folder.join(TOKENIZER).exists() {
        return Ok(false);
    }
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    std::fs::write(folder.join(TOKENIZER), serde_json::to_vec(&tokenizer(&config))?)?;
    if !folder.join(TEMPLATE).exists() {
        std::fs::write(folder.join(TEMPLATE), CHATML)?;
    }
    Ok(true)
}

fn tokenizer(config: &Value) -> Value {
    let text = config.get("text_config").unwrap_or(config);
    let id = |key: &str| config.get(key).or_else(|| text.get(key)).and_then(Value::as_u64);
    let size = text["vocab_size"].as_u64().unwrap_or(0);
    let end = match text.get("eos_token_id").or_else(|| config.get("eos_token_id")) {
        Some(Value::Array(all)) => all.first().and_then(Value::as_u64),
        Some(one) => one.as_u64(),
        None => None,
    };
    let named = [
        ("<|vision_start|>", id("vision_start_token_id")),
        ("<|vision_end|>", id("vision_end_token_id")),
        ("<|image_pad|>", id("image_token_id")),
        ("<|video_pad|>", id("video_token_id")),
        ("<|im_end|>", end),
    ];
    let mut added: Vec<(u64, &str)> = named.into_iter().filter_map(|(name, id)| Some((id?, name))).collect();
    // Names without an id in the config take the highest ones that are free.
    for name in ["<|im_start|>", "<|im_end|>"] {
        let free = (0..size).rev().find(|id| added.iter().all(|(taken, _)| taken != id));
        if let Some(free) = free.filter(|_| added.iter().all(|(_, taken)| *taken != name)) {
            added.push((free, name));
        }
    }
    added.sort_unstable();
    let special = |(id, content): &(u64, &str)| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    // An added token keeps its id only if the model's vocabulary has it.
    let bytes = byte_letters().into_iter().zip(0u64..).map(|(letter, id)| (letter.to_string(), json!(id)));
    let names = added.iter().map(|(id, name)| ((*name).to_owned(), json!(id)));
    let vocabulary: serde_json::Map<String, Value> = bytes.chain(names).collect();
    json!({
        "version": "1.0",
        "added_tokens": added.iter().map(special).collect::<Vec<_>>(),
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
    })
}

/// The letters that stand for the bytes 0 to 255 in byte-level BPE: printable ones for themselves, the others from U+0100 up.
fn byte_letters() -> Vec<char> {
    let mut others = 0x100u32..;
    (0u32..256)
        .filter_map(|byte| {
            let printable = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
            char::from_u32(if printable { byte } else { others.next()? })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use millrace_preprocess::Tokenizer;

    use super::*;

    #[test]
    fn bytes_and_special_tokens_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"vocab_size":400,"eos_token_id":[300,301],"image_token_id":310,"video_token_id":311,
            "vision_start_token_id":312,"vision_end_token_id":313}"#;
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        assert!(write_stand_in(folder.path()).unwrap());
        assert!(!write_stand_in(folder.path()).unwrap(), "a tokenizer that is there stays");
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        let ids = tokenizer.encode("<|im_start|>a é<|image_pad|><|im_end|>").unwrap();
        assert_eq!(ids.len(), 7);
        assert_eq!((ids[0], ids[5], ids[6]), (399, 310, 300));
        assert!(ids[1..5].iter().all(|id| *id < 256));
    }
}
