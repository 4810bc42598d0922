//! Whether a model folder can be served: everything that preprocessing and the executor read of it, faults of both at
//! once. The readers themselves are theirs.

use std::path::Path;

use millrace_executor::checkpoint::Checkpoint;
use millrace_executor::{Dtype, KvBudget, LoadOptions, load};
use millrace_preprocess::{ChatTemplate, GenerationConfig, ModelFacts, ProcessorConfig, Tokenizer};
use millrace_protocol::{ActorId, ModelName};

/// Reads the whole folder. `Ok` says in words what it is.
///
/// # Errors
/// Every fault found, each naming its file, key or tensor.
pub fn check_model(folder: &Path) -> Result<String, Vec<String>> {
    let mut faults = Vec::new();
    let mut note = |fault: String| {
        // Both sides read config.json: one fault, one line.
        if !faults.contains(&fault) {
            faults.push(fault);
        }
    };
    if let Err(error) = Tokenizer::load(folder) {
        note(error.to_string());
    }
    let template = ChatTemplate::load(folder).map_err(|error| note(error.to_string()));
    match ModelFacts::load(folder) {
        Err(error) => note(error.to_string()),
        Ok(facts) => {
            if let Err(error) = GenerationConfig::load(folder, &facts) {
                note(error.to_string());
            }
            if facts.vision.is_some()
                && let Err(error) = ProcessorConfig::load(folder, &facts)
            {
                note(error.to_string());
            }
        }
    }
    let loaded = load_weights(folder).map_err(&mut note);
    match (loaded, faults.is_empty()) {
        (Ok(found), true) => {
            let template = if matches!(template, Ok(Some(_))) { "" } else { ", no chat template: jobs need `prompt`" };
            Ok(format!("{found}{template} ({})", folder.display()))
        }
        _ => Err(faults),
    }
}

/// Loads the weights as the executor does, in the smallest form it has.
fn load_weights(folder: &Path) -> Result<String, String> {
    let name = |error: millrace_protocol::InvalidToken| error.to_string();
    let model = ModelName::new("check").map_err(name)?;
    let executor = ActorId::new("check").map_err(name)?;
    let options = LoadOptions {
        dtype: Dtype::Bf16,
        kv: KvBudget::Blocks(1),
        slots: 1,
        ..LoadOptions::in_process(model, executor)
    };
    let engine = load(folder, &options).map_err(|error| error.to_string())?;
    let spec = engine.spec();
    let architecture = Checkpoint::open(folder).map_err(|error| error.to_string())?.architecture().to_string();
    Ok(format!("{architecture}, {} tokens of context, vocabulary of {}", spec.max_tokens, spec.vocab))
}
