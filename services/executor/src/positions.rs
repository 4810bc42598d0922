//! Rotary positions of a sequence on three axes (temporal, height, width), and how they go on during decoding.
//! Source: transformers `Qwen3VLModel.get_rope_index`. Text stands on the diagonal; an item of `h x w` merged patches starts
//! at the next free position, spreads over height and width, and uses up `max(h, w)` positions. Must not know a model's
//! frequencies.

use millrace_protocol::ready::MediaItem;

/// Positions of one sequence.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Positions {
    spans: Vec<Span>,
    delta: i64,
}

/// Placeholders of one item: tokens `start..start + tokens` at `base`, `columns` wide.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Span {
    start: u32,
    tokens: u32,
    base: u32,
    columns: u32,
    /// Position minus token index for the text before this item.
    delta_before: i64,
}

impl Positions {
    /// Positions of a text.
    pub fn text() -> Self {
        Self::default()
    }

    /// Positions of a prompt with `media` in prompt order (checked: disjoint spans whose token counts match their grids),
    /// merged `merge` by `merge`. A clip's temporal groups are items of their own.
    pub fn with_media(media: &[MediaItem], merge: u32) -> Self {
        let mut spans = Vec::with_capacity(media.len());
        let mut delta = 0i64;
        for item in media {
            let (rows, columns) = (item.grid_h / merge, item.grid_w / merge);
            let base = shifted(item.start, delta);
            spans.push(Span { start: item.start, tokens: item.tokens, base, columns, delta_before: delta });
            delta += i64::from(rows.max(columns)) - i64::from(item.tokens);
        }
        Self { spans, delta }
    }

    /// `max position + 1 - prompt tokens` (transformers' `rope_deltas`): what is added to the index of every token behind
    /// the last item, those of the answer included.
    pub fn delta(&self) -> i64 {
        self.delta
    }

    /// The same positions with another [`Self::delta`] for what stands behind the last item.
    #[must_use]
    pub fn with_delta(mut self, delta: i64) -> Self {
        self.delta = delta;
        self
    }

    /// Position of token `index` on the axes (temporal, height, width).
    pub fn of(&self, index: u32) -> [u32; 3] {
        let next = self.spans.partition_point(|span| span.start <= index);
        let inside =
            next.checked_sub(1).and_then(|i| self.spans.get(i)).filter(|span| index - span.start < span.tokens);
        if let Some(span) = inside {
            let offset = index - span.start;
            let columns = span.columns.max(1);
            return [span.base, span.base + offset / columns, span.base + offset % columns];
        }
        let delta = self.spans.get(next).map_or(self.delta, |span| span.delta_before);
        [shifted(index, delta); 3]
    }
}

/// `index + delta`; a position is never negative because an item uses up at least one position.
fn shifted(index: u32, delta: i64) -> u32 {
    u32::try_from(i64::from(index) + delta).unwrap_or(0)
}

#[cfg(test)]
mod tests;
