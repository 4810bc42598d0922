//! One sequence in the engine: its tokens, how many of them are in the KV pool, and where.

use std::ops::Range;

use millrace_kernels::{Backend, StepInputs};
use millrace_protocol::plan::OpenSlot;
use millrace_protocol::ready::MediaItem;
use millrace_protocol::sampling::ResolvedSampling;

use crate::layers::vision::VisionFeatures;
use crate::positions::Positions;
use crate::sampling::History;

/// An image or temporal group, and its features from first touch until its last placeholder was computed.
pub(super) struct SlotItem<B: Backend> {
    pub item: MediaItem,
    pub features: Option<VisionFeatures<B>>,
}

impl<B: Backend> SlotItem<B> {
    /// Placeholder tokens.
    pub fn span(&self) -> Range<usize> {
        let start = self.item.start as usize;
        start..start + self.item.tokens as usize
    }

    /// Placeholders among `tokens`, empty if there are none.
    pub fn overlap(&self, tokens: &Range<usize>) -> Range<usize> {
        let span = self.span();
        let start = span.start.max(tokens.start);
        start..span.end.min(tokens.end).max(start)
    }
}

/// A sequence.
pub(super) struct Slot<B: Backend> {
    /// Prompt and answer. The last one may be a draw of the step under way ([`StepInputs::drawn`]).
    pub tokens: Vec<u32>,
    pub prompt_tokens: usize,
    /// Leading tokens whose keys and values are in the pool.
    pub computed: usize,
    /// Those of them that another sequence computed.
    pub cached: usize,
    /// Block table.
    pub blocks: Vec<u32>,
    pub media: Vec<SlotItem<B>>,
    pub positions: Positions,
    pub sampling: ResolvedSampling,
    pub history: History,
    /// It failed and waits for its release: plans made before the scheduler knew are passed over.
    pub failed: bool,
    /// Tells it from other sequences that had or will have this slot.
    pub generation: u64,
}

impl<B: Backend> Slot<B> {
    pub fn new(open: &OpenSlot, positions: Positions, generation: u64) -> Self {
        let prompt_tokens = open.prompt_tokens as usize;
        Self {
            tokens: open.tokens.clone(),
            prompt_tokens,
            computed: open.cached_tokens as usize,
            cached: open.cached_tokens as usize,
            blocks: open.blocks.iter().map(|block| block.0).collect(),
            media: open.media.iter().map(|item| SlotItem { item: item.clone(), features: None }).collect(),
            positions,
            sampling: open.sampling.clone(),
            history: History::new(&open.sampling, &open.tokens, prompt_tokens),
            failed: false,
            generation,
        }
    }

    /// Answer tokens so far: the position of the next draw.
    pub fn answer_position(&self) -> u64 {
        self.tokens.len().saturating_sub(self.prompt_tokens) as u64
    }

    /// Tokens that the next `count` are.
    pub fn next(&self, count: usize) -> Range<usize> {
        self.computed..self.computed + count
    }

    /// Whether the next `count` tokens hold exactly one of the prompt, and the token before it is this sequence's own: it can be
    /// computed once more, so that the one is not alone.
    pub fn lone_prompt_row(&self, count: usize) -> bool {
        let rows = self.next(count);
        rows.end.min(self.prompt_tokens).saturating_sub(rows.start) == 1 && self.computed > self.cached
    }

    /// Notes that the next `count` tokens were computed; features that no later token needs are dropped.
    pub fn advance(&mut self, count: usize) {
        self.computed += count;
        let computed = self.computed;
        for item in &mut self.media {
            if item.span().end <= computed {
                item.features = None;
            }
        }
    }

    /// Appends the token that the step now launched draws for its row `row`. Returns its index.
    pub fn push_owed(&mut self, row: usize) -> usize {
        self.tokens.push(StepInputs::drawn(u32::try_from(row).unwrap_or(u32::MAX)));
        self.tokens.len() - 1
    }

    /// Token `index` was drawn.
    pub fn learn(&mut self, index: usize, token: u32) {
        if let Some(place) = self.tokens.get_mut(index) {
            *place = token;
            self.history.push(token);
        }
    }

    /// Ends it; it needs its media no more.
    pub fn fail(&mut self) {
        self.failed = true;
        self.media.clear();
    }

    /// Appends a drawn token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.history.push(token);
    }
}
