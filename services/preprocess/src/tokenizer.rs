//! The checkpoint's tokenizer.json: text to ids and back to the text of one id.

use std::path::Path;

use millrace_protocol::{ErrorCode, JobError};

use crate::error::LoadError;

/// Turns text into token ids. Cheap to share by reference; encoding takes `&self`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a checkpoint folder.
    ///
    /// # Errors
    /// [`LoadError`] if the file is missing or malformed.
    pub fn load(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| LoadError::content(&path, error))?;
        // Limits that were active when the file was saved are no part of the model.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| LoadError::content(&path, error))?;
        Ok(Self { inner })
    }

    /// Ids of a rendered template: it already holds every special token.
    ///
    /// # Errors
    /// `internal` if the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, JobError> {
        self.run(text, false)
    }

    /// Ids of plain text, with the special tokens that the checkpoint's post-processor adds.
    ///
    /// # Errors
    /// `internal` if the tokenizer fails.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, JobError> {
        self.run(text, true)
    }

    /// Text of one token as it stands in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    fn run(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, JobError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|error| {
            JobError::new(
                ErrorCode::Internal,
                format!("the tokenizer failed on the prompt: {error}; report it with the prompt"),
            )
        })?;
        Ok(encoding.get_ids().to_vec())
    }
}
