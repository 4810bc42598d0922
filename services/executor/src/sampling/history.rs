//! What a sequence has said so far, as the penalties need it.

use std::collections::BTreeMap;

use millrace_protocol::sampling::ResolvedSampling;

/// Token ids of prompt and answer. Holds nothing if no penalty needs it.
#[derive(Debug, Clone, Default)]
pub struct History {
    tracked: bool,
    /// How often the answer holds the token; 0 for a token of the prompt alone.
    counts: BTreeMap<u32, u32>,
}

impl History {
    /// History of `tokens`, of which the first `prompt_tokens` are prompt.
    pub fn new(sampling: &ResolvedSampling, tokens: &[u32], prompt_tokens: usize) -> Self {
        let tracked =
            sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        let mut history = Self { tracked, counts: BTreeMap::new() };
        if tracked {
            let (prompt, answer) = tokens.split_at(prompt_tokens.min(tokens.len()));
            history.counts.extend(prompt.iter().map(|&id| (id, 0)));
            answer.iter().for_each(|&id| history.push(id));
        }
        history
    }

    /// Adds a token of the answer.
    pub fn push(&mut self, token: u32) {
        if self.tracked {
            *self.counts.entry(token).or_insert(0) += 1;
        }
    }

    /// Every token of prompt and answer, once.
    pub fn seen(&self) -> impl Iterator<Item = u32> + '_ {
        self.counts.keys().copied()
    }

    /// Every token of the answer and how often it is there.
    pub fn answered(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.counts.iter().filter(|(_, count)| **count > 0).map(|(id, count)| (*id, *count))
    }
}
