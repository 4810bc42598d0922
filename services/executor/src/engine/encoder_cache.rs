//! Vision features of pages seen before: a picture sent again, or a sequence computed anew, is not encoded twice.
//! Features depend on a page's content and its grid alone, so a hit changes no result.

use std::collections::VecDeque;

use millrace_kernels::Backend;
use millrace_protocol::ready::MediaItem;

use crate::layers::vision::VisionFeatures;

/// Content and how it is cut into a grid.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    hash: [u8; 16],
    shape: Vec<u32>,
    grid: (u32, u32),
}

impl Key {
    fn of(item: &MediaItem) -> Self {
        Self { hash: item.patches.hash, shape: item.patches.shape.clone(), grid: (item.grid_h, item.grid_w) }
    }
}

/// The features used last, at the back the newest. Bounded by the patches behind them, which their size follows.
pub(super) struct EncoderCache<B: Backend> {
    entries: VecDeque<(Key, u64, VisionFeatures<B>)>,
    patches: u64,
    most_patches: u64,
}

impl<B: Backend> EncoderCache<B> {
    /// A cache for items of `most_patches` patches together.
    pub fn new(most_patches: u64) -> Self {
        Self { entries: VecDeque::new(), patches: 0, most_patches }
    }

    /// Features of `item`'s page; storage is shared with the cache.
    pub fn get(&mut self, item: &MediaItem) -> Option<VisionFeatures<B>> {
        let key = Key::of(item);
        let at = self.entries.iter().position(|(known, _, _)| *known == key)?;
        let entry = self.entries.remove(at)?;
        let features = entry.2.clone();
        self.entries.push_back(entry);
        Some(features)
    }

    /// Keeps `features` of `item`, at the cost of those used least recently. What alone is too large is not kept.
    pub fn put(&mut self, item: &MediaItem, features: &VisionFeatures<B>) {
        let patches = u64::from(item.grid_h) * u64::from(item.grid_w);
        if patches > self.most_patches || self.get(item).is_some() {
            return;
        }
        while self.patches + patches > self.most_patches {
            let Some((_, freed, _)) = self.entries.pop_front() else { break };
            self.patches -= freed;
        }
        self.patches += patches;
        self.entries.push_back((Key::of(item), patches, features.clone()));
    }
}
