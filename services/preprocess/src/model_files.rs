//! Reading the JSON files of a checkpoint folder, and what preprocessing needs of config.json.

use std::path::{Path, PathBuf};

use millrace_protocol::PageDtype;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::LoadError;

/// Reads and parses a file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, LoadError> {
    let bytes = std::fs::read(path).map_err(|source| LoadError::Read { path: path.into(), source })?;
    serde_json::from_slice(&bytes).map_err(|error| LoadError::content(path, error))
}

/// Like [`read_json`]; `None` if the file does not exist.
pub(crate) fn read_json_if_present<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LoadError> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}

/// Token ids by which media stand in a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VisionTokens {
    /// Placeholder of an image.
    pub image: u32,
    /// Placeholder of a video frame group.
    pub video: u32,
    /// Before visual tokens.
    pub start: u32,
    /// After them.
    pub end: u32,
}

/// What preprocessing needs of config.json.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    /// Rows of the vocabulary: ids below this are valid.
    pub vocab: u32,
    /// Longest sequence, prompt and answer together.
    pub max_tokens: u32,
    /// Element type of the weights, and so of normalised pages.
    pub dtype: PageDtype,
    /// End-of-text ids named here; generation_config.json goes first.
    pub eos: Vec<u32>,
    /// Set if the model sees.
    pub vision: Option<VisionTokens>,
    /// Side of the vision tower's patches.
    pub vision_patch: Option<u32>,
}

impl ModelFacts {
    /// Reads `config.json` of a checkpoint folder.
    ///
    /// # Errors
    /// [`LoadError`] naming the key that is missing or out of range.
    pub fn load(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("config.json");
        let config: Value = read_json(&path)?;
        let text = config.get("text_config").unwrap_or(&config);
        let need = |value: &Value, key: &str| number(value, key).ok_or_else(|| missing(&path, key));
        let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(*key).or(text.get(*key))?.as_str());
        let vision_config = config.get("vision_config");
        let vision = match vision_config {
            None => None,
            Some(_) => Some(VisionTokens {
                image: need(&config, "image_token_id")?,
                video: need(&config, "video_token_id")?,
                start: need(&config, "vision_start_token_id")?,
                end: need(&config, "vision_end_token_id")?,
            }),
        };
        let eos = [&config, text].into_iter().map(|c| ids(c.get("eos_token_id"))).find(|ids| !ids.is_empty());
        Ok(Self {
            vocab: need(text, "vocab_size")?,
            max_tokens: need(text, "max_position_embeddings")?,
            dtype: if dtype == Some("float32") { PageDtype::F32 } else { PageDtype::Bf16 },
            eos: eos.unwrap_or_default(),
            vision,
            vision_patch: vision_config.and_then(|vision| number(vision, "patch_size")),
        })
    }
}

/// One id or a list of ids; empty if there is none.
pub(crate) fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

fn number(value: &Value, key: &str) -> Option<u32> {
    u32::try_from(value.get(key)?.as_u64()?).ok()
}

fn missing(path: &Path, key: &str) -> LoadError {
    LoadError::content(PathBuf::from(path), format!("`{key}` is missing or not a number"))
}
