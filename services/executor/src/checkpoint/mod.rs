//! A model directory: config.json and safetensors, read strictly. Must not know a model: names, shapes and defaults come
//! from the model files.

mod fields;
mod file;
mod hash;
mod loader;
mod rope_config;
mod source;
mod weights;

use std::path::Path;

use serde_json::Value;

pub use fields::Fields;
pub use loader::Loader;
pub use rope_config::RopeConfig;
pub use source::{Pieces, TensorSource};
pub use weights::Weights;

use crate::error::ExecutorError;

/// An opened model directory.
#[derive(Debug)]
pub struct Checkpoint {
    config: Value,
    architecture: String,
    weights: Weights,
    weights_hash: String,
}

impl Checkpoint {
    /// Reads config.json and opens the weights of `dir`.
    ///
    /// # Errors
    /// Files that cannot be read or understood; `quantization_config`, which nothing here undoes.
    pub fn open(dir: &Path) -> Result<Self, ExecutorError> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).map_err(|source| ExecutorError::Io { path: path.clone(), source })?;
        let config: Value = serde_json::from_slice(&text)
            .map_err(|error| ExecutorError::Malformed { path: path.clone(), what: error.to_string() })?;
        let root = Fields::root(&config)?;
        let architecture = root.texts("architectures")?.into_iter().next().ok_or_else(|| ExecutorError::Config {
            key: "architectures".into(),
            what: "is missing or empty: it names the model".into(),
        })?;
        reject_quantization(&root)?;
        let weights = Weights::open(dir)?;
        let weights_hash = hash::weights_hash(&text, &weights)?;
        Ok(Self { config, architecture, weights, weights_hash })
    }

    /// `architectures[0]`: the key of the model registry.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Identity of config and weights, 32 hex digits.
    pub fn weights_hash(&self) -> &str {
        &self.weights_hash
    }

    /// Elements of all tensors that were not taken yet.
    pub fn elements(&self) -> u64 {
        self.weights.elements()
    }

    /// The config and the weights, for a model to take apart.
    ///
    /// # Errors
    /// config.json is not an object.
    pub fn parts(&mut self) -> Result<(Fields<'_>, &mut Weights), ExecutorError> {
        Ok((Fields::root(&self.config)?, &mut self.weights))
    }

    /// Ends loading.
    ///
    /// # Errors
    /// [`ExecutorError::UnusedTensors`] if the model left any tensor.
    pub fn finish(self) -> Result<(), ExecutorError> {
        self.weights.finish()
    }
}

fn reject_quantization(root: &Fields<'_>) -> Result<(), ExecutorError> {
    let nested = root.optional_object("text_config")?;
    if root.has("quantization_config") || nested.is_some_and(|text| text.has("quantization_config")) {
        return Err(ExecutorError::Unsupported("quantised weights (`quantization_config`)".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
