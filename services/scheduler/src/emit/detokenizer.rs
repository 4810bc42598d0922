//! Tokens to text, one at a time, as decoding all of them at once would give it: special tokens are skipped, and bytes
//! that may still become a character are held back. Must not know stop texts.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use tokenizers::Tokenizer;

use crate::error::SchedulerError;

/// What follows the incomplete end of a character in a lossy decoding.
const REPLACEMENT: char = '\u{FFFD}';

/// Tokens that are held back at most: no character is longer, so what still does not decode never will.
const MOST_HELD_TOKENS: usize = 16;

/// A checkpoint's tokenizer, for decoding. Shared by all sequences.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    special: HashSet<u32>,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("special", &self.special.len()).finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// Reads `tokenizer.json` of a checkpoint.
    ///
    /// # Errors
    /// [`SchedulerError::Tokenizer`] if it is missing or not a tokenizer.
    pub fn load(model_dir: &Path) -> Result<Self, SchedulerError> {
        let path = model_dir.join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|e| SchedulerError::Tokenizer { path: path.clone(), message: e.to_string() })?;
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        Ok(Self { tokenizer, special })
    }

    /// Decodes tokens at once, special ones skipped, as transformers' `decode(skip_special_tokens=True)`.
    ///
    /// # Errors
    /// [`SchedulerError::Decode`] if the tokenizer's decoder refuses them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, SchedulerError> {
        self.tokenizer.decode(tokens, true).map_err(|e| SchedulerError::Decode(e.to_string()))
    }
}

/// Decodes one sequence's answer.
#[derive(Debug)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    /// The tokens shown last, then those held back. A decoder may treat the first token of a text differently, so the new
    /// ones are decoded behind the last ones shown.
    window: Vec<u32>,
    /// Tokens of the window that are shown.
    shown_tokens: usize,
    /// Bytes of text that the shown tokens of the window decode to.
    shown_bytes: usize,
}

impl Detokenizer {
    /// A decoder at the start of an answer.
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary, window: Vec::new(), shown_tokens: 0, shown_bytes: 0 }
    }

    /// Takes the next token; returns the text that is certain now, often that of the token.
    ///
    /// # Errors
    /// [`SchedulerError::Decode`].
    pub fn push(&mut self, token: u32) -> Result<String, SchedulerError> {
        if self.vocabulary.special.contains(&token) {
            return Ok(String::new());
        }
        self.window.push(token);
        let text = self.vocabulary.decode(&self.window)?;
        let held = self.window.len() - self.shown_tokens;
        if text.len() <= self.shown_bytes || (text.ends_with(REPLACEMENT) && held < MOST_HELD_TOKENS) {
            return Ok(String::new());
        }
        self.show(&text)
    }

    /// The text of what is held back: the answer has ended.
    ///
    /// # Errors
    /// [`SchedulerError::Decode`].
    pub fn finish(&mut self) -> Result<String, SchedulerError> {
        let text = self.vocabulary.decode(&self.window)?;
        if text.len() <= self.shown_bytes {
            return Ok(String::new());
        }
        self.show(&text)
    }

    fn show(&mut self, text: &str) -> Result<String, SchedulerError> {
        let new = text.get(self.shown_bytes..).map(str::to_owned);
        let new = new.ok_or_else(|| SchedulerError::Decode("the tokenizer changes text it gave before".to_owned()))?;
        self.window.drain(..self.shown_tokens);
        self.shown_tokens = self.window.len();
        self.shown_bytes = self.vocabulary.decode(&self.window)?.len();
        Ok(new)
    }
}
