//! The items of models that see: patches as tensor pages in RAM and on disk, and pixels that become patches in one pass.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use millrace_executor::MediaSource;
use millrace_executor::generate::Generated;
use millrace_pager::{PageStore, PagerLimits};
use millrace_preprocess::{PatchLayout, Patchifier};
use millrace_protocol::ready::MediaItem;
use millrace_protocol::{ActorId, ErrorCode, JobError, JobId, PageDtype, PageRef};
use millrace_runtime::Clock;
use millrace_tests::workspace::files;

use crate::stand::{Stand, spill_root, tokens};

struct Pages(Arc<PageStore>);

impl MediaSource for Pages {
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError> {
        self.0.get(page.page).map_err(|error| JobError::new(ErrorCode::PageLost, error.to_string()))
    }
}

/// Patches are pages of a store: in RAM, or beyond its budget on disk, with the same answer; a page that changed on disk is refused.
pub fn paging(stand: &Stand) -> Result<String> {
    let (grid, shape) = ((4u32, 6u32), [24u32, 3, 1, 4, 4]);
    let elements = shape.iter().product::<u32>();
    let item = |seed: u32| -> Bytes {
        let value = |n: u32| ((n * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
        (0..elements).flat_map(|n| value(n).to_le_bytes()).collect()
    };
    let mut prompt = tokens(4, 1);
    let starts = [5u32, 13];
    for _ in starts {
        prompt.push(300);
        prompt.extend([321; 6]);
        prompt.push(301);
    }
    prompt.extend(tokens(3, 2));
    let run = |ram_bytes: u64, expect_disk: bool| -> Result<(Generated, Arc<PageStore>)> {
        let limits = PagerLimits {
            ram_bytes,
            disk_bytes: 1 << 20,
            spill_root: spill_root(stand),
            lease: Duration::from_secs(600),
        };
        let store = Arc::new(PageStore::open(ActorId::new("floor")?, limits)?);
        let job = JobId::new("job")?;
        let mut items = Vec::new();
        for (seed, start) in (1u32..).zip(starts) {
            let patches = store.put(&job, PageDtype::F32, &shape, item(seed), Clock::system().now())?;
            items.push(MediaItem { start, tokens: 6, grid_h: grid.0, grid_w: grid.1, patches, normalise: None });
        }
        let held = store.counters();
        let on_disk = spilled_files(stand)?.len();
        ensure!((held.spills > 0) == expect_disk, "{held:?}");
        ensure!(!expect_disk || (on_disk > 0 && held.ram_bytes <= ram_bytes), "{held:?}, {on_disk} files");
        let (result, _) = stand.alone(&prompt, &items, 4, None, &mut Pages(Arc::clone(&store)))?;
        let read = store.counters();
        ensure!((read.misses > 0) == expect_disk, "{read:?}");
        Ok((result, store))
    };
    let page = u64::from(elements) * 4;
    let (kept, _) = run(10 * page, false)?;
    let (spilled, store) = run(page / 2, true)?;
    ensure!(kept == spilled && kept.logits.len() == prompt.len() + 3, "pages from disk give another answer");
    for file in spilled_files(stand)? {
        let mut bytes = std::fs::read(&file)?;
        bytes.iter_mut().last().into_iter().for_each(|last| *last ^= 1);
        std::fs::write(&file, bytes)?;
    }
    let reads: Vec<_> = (0..4).filter_map(|number| store.get(number).err()).map(|error| error.label()).collect();
    ensure!(reads.contains(&"corrupt"), "a changed page was read: {reads:?}");
    Ok("RAM = disk".into())
}

/// Files that hold pages.
fn spilled_files(stand: &Stand) -> Result<Vec<PathBuf>> {
    let all = files(&spill_root(stand), "")?;
    Ok(all.into_iter().filter(|path| path.metadata().is_ok_and(|found| found.len() > 0)).collect())
}

/// Pixels become normalised patches without an image-sized buffer in between.
pub fn fused_resize() -> Result<String> {
    let (source, target) = ((3000u32, 4000u32), (1472u32, 2016u32));
    let layout = PatchLayout { patch: 16, merge: 2, slots: 1 };
    let patchifier = Patchifier::new(source, target, layout, [0.5; 3], [0.5; 3], PageDtype::Bf16);
    // Touched before, so that only what the work itself takes is new.
    let pixels = vec![51u8; source.0 as usize * source.1 as usize * 3];
    let mut out = vec![0xffu8; patchifier.output_bytes()];
    let before = peak_kb(true)?;
    ensure!(patchifier.write(&pixels, 0, &mut out), "refused");
    let taken_kb = peak_kb(false)?.saturating_sub(before);
    let image_kb = target.0 as usize * target.1 as usize * 3 / 1024;
    ensure!(taken_kb < image_kb / 2, "{taken_kb} kB beside source and patches; the resized image alone has {image_kb}");
    let wanted = half_of((51.0 - 127.5) / 127.5);
    ensure!(out.chunks(2).all(|element| element == wanted), "a flat image is not flat");
    Ok(format!("{taken_kb} of {image_kb} kB"))
}

/// The bits of a bf16 number, rounded to nearest even.
fn half_of(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16).to_le_bytes()
}

/// Most memory that this process held since the last reset, in kB.
fn peak_kb(reset: bool) -> Result<usize> {
    if reset {
        std::fs::write("/proc/self/clear_refs", "5")?;
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM")).context("VmHWM")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
}
