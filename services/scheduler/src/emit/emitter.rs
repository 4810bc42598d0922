//! One answer on its way out: tokens become text, text waits until it is certain, deltas are taken when somebody can
//! write them. What is shown after n tokens depends on those tokens alone, so an answer can go on in another process.

use std::sync::Arc;

use millrace_protocol::ready::Shown;
use millrace_protocol::sampling::TokenLogprobs;

use super::detokenizer::{Detokenizer, Vocabulary};
use super::stop::StopMatcher;
use crate::error::SchedulerError;

/// What is new since the last delta.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Tokens.
    pub token_ids: Vec<u32>,
    /// Text that became certain with them.
    pub text: String,
    /// One for each token, or none at all.
    pub logprobs: Vec<TokenLogprobs>,
}

impl Delta {
    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.token_ids.is_empty() && self.text.is_empty()
    }

    /// Appends a later delta.
    pub fn merge(&mut self, later: Self) {
        self.token_ids.extend(later.token_ids);
        self.text.push_str(&later.text);
        self.logprobs.extend(later.logprobs);
    }
}

/// Turns one sequence's tokens into deltas.
#[derive(Debug)]
pub struct Emitter {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    token_ids: Vec<u32>,
    text: String,
    new: Delta,
    /// Text that an earlier owner has shown at what it took for the end, and that has not come again yet.
    ahead: String,
}

impl Emitter {
    /// The emitter of an answer of which `shown` is out already, and the stop text if that ends it.
    ///
    /// # Errors
    /// [`SchedulerError::Continuity`] if the shown text is not that of the shown tokens: going on would garble the answer.
    pub fn resume(
        vocabulary: Arc<Vocabulary>,
        stops: Vec<String>,
        shown: &Shown,
    ) -> Result<(Self, Option<String>), SchedulerError> {
        let mut emitter = Self {
            detokenizer: Detokenizer::new(vocabulary),
            stops: StopMatcher::new(stops),
            token_ids: Vec::new(),
            text: String::new(),
            new: Delta::default(),
            ahead: String::new(),
        };
        let mut stop = None;
        for token in &shown.token_ids {
            stop = emitter.push(*token, None)?;
            if stop.is_some() {
                break;
            }
        }
        let ahead = shown.text.strip_prefix(emitter.text.as_str()).map(str::to_owned);
        emitter.ahead = ahead.filter(|_| emitter.token_ids == shown.token_ids).ok_or(SchedulerError::Continuity)?;
        emitter.new = Delta::default();
        Ok((emitter, stop))
    }

    /// Takes a drawn token. Returns the stop text if that ends the answer.
    ///
    /// # Errors
    /// [`SchedulerError::Decode`] if the tokenizer refuses it.
    pub fn push(&mut self, token: u32, logprobs: Option<TokenLogprobs>) -> Result<Option<String>, SchedulerError> {
        self.token_ids.push(token);
        self.new.token_ids.push(token);
        self.new.logprobs.extend(logprobs);
        let piece = self.detokenizer.push(token)?;
        self.pass(&piece)
    }

    /// The answer has ended without a stop text: shows what was held back. It may complete a stop text after all.
    ///
    /// # Errors
    /// [`SchedulerError::Decode`].
    pub fn finish(&mut self) -> Result<Option<String>, SchedulerError> {
        let piece = self.detokenizer.finish()?;
        let stop = self.pass(&piece)?;
        if stop.is_none() {
            let rest = self.stops.finish();
            self.show(&rest)?;
        }
        Ok(stop)
    }

    /// What is new, if anything is.
    pub fn take(&mut self) -> Option<Delta> {
        (!self.new.is_empty()).then(|| std::mem::take(&mut self.new))
    }

    /// All tokens so far.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// All text that may be shown so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn pass(&mut self, piece: &str) -> Result<Option<String>, SchedulerError> {
        let passed = self.stops.push(piece);
        self.show(&passed.text)?;
        Ok(passed.stop)
    }

    fn show(&mut self, text: &str) -> Result<(), SchedulerError> {
        self.text.push_str(text);
        let common = self.ahead.len().min(text.len());
        if self.ahead.as_bytes()[..common] != text.as_bytes()[..common] {
            return Err(SchedulerError::Continuity);
        }
        self.ahead.drain(..common);
        self.new.text.push_str(&text[common..]);
        Ok(())
    }
}
