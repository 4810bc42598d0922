//! Media of a step: which items it touches for the first time, their pages, and their features.

use millrace_kernels::Backend;
use millrace_protocol::JobError;
use millrace_protocol::step::StepOutput;

use super::assemble::Share;
use super::media::patch_grid;
use super::slot::SlotItem;
use super::{Broken, Engine, MediaSource};
use crate::layers::vision::{PatchGrid, VisionFeatures};
use crate::models::PatchSpec;

/// An item that needs features: its slot, its number there, and its pixels or what the cache has for it.
struct Touched<B: Backend> {
    slot: u32,
    number: usize,
    content: Content<B>,
}

enum Content<B: Backend> {
    Known(VisionFeatures<B>),
    Pixels(PatchGrid),
}

impl<B: Backend> Engine<B> {
    /// Gives features to every item that the shares touch and that has none. A page that cannot be had or does not fit fails
    /// its sequence alone.
    pub(super) fn encode(
        &mut self,
        shares: &[Share],
        media: &mut dyn MediaSource,
        output: &mut StepOutput,
    ) -> Result<(), Broken> {
        let Some(patches) = self.limits.model.vision else { return Ok(()) };
        let mut touched = Vec::new();
        for share in shares {
            match self.touch(share, media, &patches)? {
                Ok(items) => touched.extend(items),
                Err(error) => self.fail(share.slot, error, output),
            }
        }
        let mut run = Vec::new();
        let mut run_patches = 0;
        for Touched { slot, number, content } in touched {
            match content {
                Content::Known(features) => self.give(slot, number, &features)?,
                Content::Pixels(grid) => {
                    let count = u64::from(grid.grid_h) * u64::from(grid.grid_w);
                    if run_patches + count > u64::from(self.spec.step_patches) {
                        self.run_tower(std::mem::take(&mut run))?;
                        run_patches = 0;
                    }
                    run_patches += count;
                    run.push((slot, number, grid));
                }
            }
        }
        self.run_tower(run)
    }

    /// Items of one share without features, all of them or the first fault.
    fn touch(
        &mut self,
        share: &Share,
        media: &mut dyn MediaSource,
        patches: &PatchSpec,
    ) -> Result<Result<Vec<Touched<B>>, JobError>, Broken> {
        let Some(slot) = self.slots.get(&share.slot) else { return Ok(Ok(Vec::new())) };
        let tokens = slot.next(share.count);
        let wanted = |item: &SlotItem<B>| item.features.is_none() && !item.overlap(&tokens).is_empty();
        let mut items = Vec::new();
        for (number, own) in slot.media.iter().enumerate().filter(|(_, own)| wanted(own)) {
            let content = match self.encoder_cache.get(&self.backend, &own.item)? {
                Some(features) => Content::Known(features),
                None => {
                    let page = media.patches(&own.item.patches);
                    match page.and_then(|bytes| patch_grid(&own.item, &bytes, patches)) {
                        Ok(grid) => Content::Pixels(grid),
                        Err(error) => return Ok(Err(error)),
                    }
                }
            };
            items.push(Touched { slot: share.slot, number, content });
        }
        Ok(Ok(items))
    }

    /// One run of the tower over items that do not see each other.
    fn run_tower(&mut self, run: Vec<(u32, usize, PatchGrid)>) -> Result<(), Broken> {
        if run.is_empty() {
            return Ok(());
        }
        self.backend.begin()?;
        let (places, grids): (Vec<_>, Vec<_>) = run.into_iter().map(|(slot, n, grid)| ((slot, n), grid)).unzip();
        let features = self.model.encode(&self.backend, &grids)?;
        for ((slot, number), features) in places.into_iter().zip(features) {
            self.give(slot, number, &features)?;
        }
        Ok(())
    }

    fn give(&mut self, slot: u32, number: usize, features: &VisionFeatures<B>) -> Result<(), Broken> {
        if let Some(own) = self.slots.get_mut(&slot).and_then(|slot| slot.media.get_mut(number)) {
            own.features = Some(self.encoder_cache.put(&self.backend, &own.item, features)?);
        }
        Ok(())
    }
}
