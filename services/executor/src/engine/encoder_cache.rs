//! Vision features of pages seen before: a picture sent again, or a sequence computed anew, is not encoded twice.
//! Features depend on a page's content, its grid and its normalisation alone, so a hit changes no result.
//!
//! Features lie on the device as long as their bytes have room there; the least recently used go to host memory (page-locked
//! where the device copies by itself), and come back by a copy when their content is asked for again. Both are bounded.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace_kernels::{Backend, HostMemory, KernelError, Place, SlabBook};
use millrace_protocol::ready::{MediaItem, Normalise};

use super::LoadOptions;
use crate::layers::vision::VisionFeatures;

/// Content, how it is cut into a grid, and how it is normalised.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    hash: [u8; 16],
    shape: Vec<u32>,
    grid: (u32, u32),
    normalise: Option<[u32; 6]>,
}

impl Key {
    fn of(item: &MediaItem) -> Self {
        Self {
            hash: item.patches.hash,
            shape: item.patches.shape.clone(),
            grid: (item.grid_h, item.grid_w),
            normalise: item.normalise.as_ref().map(Normalise::bits),
        }
    }
}

/// How often features were found, and where.
#[derive(Debug, Default)]
pub struct EncoderCounts {
    /// On the device.
    pub device: AtomicU64,
    /// In host memory.
    pub host: AtomicU64,
    /// Nowhere: the tower ran.
    pub misses: AtomicU64,
}

/// Features of one item on the device.
struct Resident<B: Backend> {
    key: Key,
    bytes: u64,
    features: VisionFeatures<B>,
}

/// Features of one item in host memory: where, and the shape of each part.
struct Demoted {
    key: Key,
    place: Place,
    shapes: Vec<Vec<usize>>,
}

/// Both lists, at the back what was used last.
pub(super) struct EncoderCache<B: Backend> {
    resident: VecDeque<Resident<B>>,
    bytes: u64,
    most_bytes: u64,
    host: Option<HostMemory>,
    book: SlabBook,
    demoted: VecDeque<Demoted>,
    counts: Arc<EncoderCounts>,
}

impl<B: Backend> EncoderCache<B> {
    /// A cache within the bounds of `options`, for a model that `sees`. Without the host memory asked for, features that leave
    /// the device are forgotten.
    pub fn new(backend: &B, options: &LoadOptions, sees: bool) -> Self {
        let wanted = usize::try_from(options.encoder_host_bytes).unwrap_or(0);
        let host = match (sees && wanted > 0).then(|| backend.host_memory(wanted)).transpose() {
            Ok(memory) => memory,
            Err(error) => {
                tracing::warn!(%error, "no host memory for vision features: lower `[executor] encoder_host_bytes`");
                None
            }
        };
        let mut book = SlabBook::default();
        book.add(host.as_ref().map_or(0, HostMemory::size));
        let (resident, demoted, counts) = (VecDeque::new(), VecDeque::new(), Arc::default());
        Self { resident, bytes: 0, most_bytes: options.encoder_device_bytes, host, book, demoted, counts }
    }

    /// Counters, for metrics.
    pub fn counts(&self) -> Arc<EncoderCounts> {
        self.counts.clone()
    }

    /// Features of `item`'s page; storage is shared with the cache.
    pub fn get(&mut self, backend: &B, item: &MediaItem) -> Result<Option<VisionFeatures<B>>, KernelError> {
        let key = Key::of(item);
        if let Some(features) = self.touch(&key) {
            self.counts.device.fetch_add(1, Ordering::Relaxed);
            return Ok(Some(features));
        }
        let Some(features) = self.fetch(backend, &key)? else {
            self.counts.misses.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        };
        self.counts.host.fetch_add(1, Ordering::Relaxed);
        self.admit(backend, key, features.clone())?;
        Ok(Some(features))
    }

    /// Keeps `features` of `item`, at the cost of those used least recently; what alone is too large is not kept. Gives what the
    /// item's sequence should hold: the same elements in memory that may outlive a step.
    pub fn put(
        &mut self,
        backend: &B,
        item: &MediaItem,
        features: &VisionFeatures<B>,
    ) -> Result<VisionFeatures<B>, KernelError> {
        let key = Key::of(item);
        if let Some(known) = self.touch(&key) {
            return Ok(known);
        }
        let kept = features.keep(backend)?;
        self.admit(backend, key, kept.clone())?;
        Ok(kept)
    }

    /// What is on the device, now the newest.
    fn touch(&mut self, key: &Key) -> Option<VisionFeatures<B>> {
        let at = self.resident.iter().position(|entry| entry.key == *key)?;
        let entry = self.resident.remove(at)?;
        let features = entry.features.clone();
        self.resident.push_back(entry);
        Some(features)
    }

    fn admit(&mut self, backend: &B, key: Key, features: VisionFeatures<B>) -> Result<(), KernelError> {
        let bytes = features.parts().map(|part| backend.tensor_bytes(part) as u64).sum::<u64>();
        if bytes > self.most_bytes {
            return Ok(());
        }
        while self.bytes + bytes > self.most_bytes {
            let Some(oldest) = self.resident.pop_front() else { break };
            self.bytes -= oldest.bytes;
            self.demote(backend, oldest)?;
        }
        self.bytes += bytes;
        self.resident.push_back(Resident { key, bytes, features });
        Ok(())
    }

    /// Copies features to host memory, if they are not there already and are not larger than all of it.
    fn demote(&mut self, backend: &B, entry: Resident<B>) -> Result<(), KernelError> {
        let Some(host) = &mut self.host else { return Ok(()) };
        if self.demoted.iter().any(|known| known.key == entry.key) {
            return Ok(());
        }
        let bytes = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
        let place = loop {
            match self.book.take(bytes) {
                Some(place) => break place,
                None => match self.demoted.pop_front() {
                    Some(oldest) => self.book.give_back(oldest.place),
                    None => return Ok(()),
                },
            }
        };
        let mut offset = place.offset;
        let mut shapes = Vec::new();
        for part in entry.features.parts() {
            backend.read_tensor(part, host, offset)?;
            offset += backend.tensor_bytes(part);
            shapes.push(backend.shape(part));
        }
        self.demoted.push_back(Demoted { key: entry.key, place, shapes });
        Ok(())
    }

    /// Copies back what is in host memory. It stays there as well: demoting it again costs nothing.
    fn fetch(&mut self, backend: &B, key: &Key) -> Result<Option<VisionFeatures<B>>, KernelError> {
        let at = self.demoted.iter().position(|entry| entry.key == *key);
        let (Some(host), Some(entry)) = (&mut self.host, at.and_then(|at| self.demoted.remove(at))) else {
            return Ok(None);
        };
        let mut offset = entry.place.offset;
        let mut parts = VecDeque::with_capacity(entry.shapes.len());
        for shape in &entry.shapes {
            let part = backend.write_tensor(shape, host, offset)?;
            offset += backend.tensor_bytes(&part);
            parts.push_back(part);
        }
        self.demoted.push_back(entry);
        Ok(parts.pop_front().map(|embeddings| VisionFeatures { embeddings, deepstack: parts.into() }))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use millrace_kernels::CpuBackend;
    use millrace_protocol::{ActorId, ModelName, PageDtype, PageRef};

    use super::*;

    /// Rows of features of every item, and their bytes as they are counted: two parts of `ROWS x 8` f32.
    const ROWS: usize = 16;
    const BYTES: u64 = 2 * 16 * 8 * 4;

    fn item(content: u8) -> MediaItem {
        let node = ActorId::new("test").unwrap();
        let shape = vec![64, 3, 1, 2, 2];
        let patches = PageRef { node, page: 1, dtype: PageDtype::F32, shape, bytes: 0, hash: [content; 16] };
        MediaItem { start: 0, tokens: 16, grid_h: 8, grid_w: 8, patches, normalise: None }
    }

    fn features(backend: &CpuBackend, content: u8) -> VisionFeatures<CpuBackend> {
        let part = |add: f32| {
            let values: Vec<f32> = (0..ROWS * 8).map(|n| f32::from(content) * 0.37 + n as f32 * 1.1 + add).collect();
            backend.upload(&values, &[ROWS, 8]).unwrap()
        };
        VisionFeatures { embeddings: part(0.0), deepstack: vec![part(-7.5)] }
    }

    fn bits(backend: &CpuBackend, features: &VisionFeatures<CpuBackend>) -> Vec<u32> {
        features.parts().flat_map(|part| backend.to_host(part).unwrap()).map(f32::to_bits).collect()
    }

    /// A cache for two items on the device and `host` in host memory.
    fn cache(backend: &CpuBackend, host: u64) -> EncoderCache<CpuBackend> {
        let (model, executor) = (ModelName::new("m").unwrap(), ActorId::new("e").unwrap());
        let own = LoadOptions::in_process(model, executor);
        let options = LoadOptions { encoder_device_bytes: 2 * BYTES, encoder_host_bytes: host * BYTES, ..own };
        EncoderCache::new(backend, &options, true)
    }

    fn counts(cache: &EncoderCache<CpuBackend>) -> [u64; 3] {
        let counts = cache.counts();
        [&counts.device, &counts.host, &counts.misses].map(|count| count.load(Ordering::Relaxed))
    }

    #[test]
    fn what_leaves_the_device_comes_back_with_equal_bits() {
        for dtype in [DType::F32, DType::BF16] {
            let backend = CpuBackend::new(dtype).unwrap();
            let mut cache = cache(&backend, 4);
            for content in [1, 2, 3, 4] {
                assert!(cache.get(&backend, &item(content)).unwrap().is_none());
                cache.put(&backend, &item(content), &features(&backend, content)).unwrap();
            }
            assert_eq!((cache.bytes, counts(&cache)), (2 * BYTES, [0, 0, 4]));
            for content in [4, 1, 2, 1, 3] {
                let found = cache.get(&backend, &item(content)).unwrap().unwrap();
                assert_eq!(bits(&backend, &found), bits(&backend, &features(&backend, content)), "{dtype:?} {content}");
            }
            assert_eq!(counts(&cache), [2, 3, 4], "{dtype:?}: 4 and 1 were on the device, 1, 2 and 3 in host memory");
            assert_eq!(cache.bytes, 2 * BYTES);
        }
    }

    #[test]
    fn equal_samples_normalised_otherwise_are_other_content() {
        let backend = CpuBackend::new(DType::F32).unwrap();
        let mut own = cache(&backend, 1);
        let of = |mean: f32| MediaItem { normalise: Some(Normalise { mean: [mean; 3], std: [0.5; 3] }), ..item(1) };
        own.put(&backend, &of(0.5), &features(&backend, 1)).unwrap();
        assert!(own.get(&backend, &of(0.25)).unwrap().is_none() && own.get(&backend, &item(1)).unwrap().is_none());
        assert!(own.get(&backend, &of(0.5)).unwrap().is_some());
    }

    #[test]
    fn both_places_are_bounded() {
        let backend = CpuBackend::new(DType::F32).unwrap();
        let mut own = cache(&backend, 1);
        for content in 1..=9 {
            own.put(&backend, &item(content), &features(&backend, content)).unwrap();
            assert!(own.bytes <= 2 * BYTES && own.demoted.len() <= 1);
        }
        // 8 and 9 are on the device, 7 is in host memory.
        assert!(own.get(&backend, &item(6)).unwrap().is_none());
        assert!(own.get(&backend, &item(7)).unwrap().is_some());
        let mut without = cache(&backend, 0);
        for content in [1, 2, 3] {
            without.put(&backend, &item(content), &features(&backend, content)).unwrap();
        }
        assert!(without.get(&backend, &item(1)).unwrap().is_none());
        assert_eq!(counts(&without), [0, 0, 1]);
    }

    #[test]
    fn what_is_too_large_alone_is_given_and_not_kept() {
        let backend = CpuBackend::new(DType::F32).unwrap();
        let mut own = cache(&backend, 1);
        own.most_bytes = BYTES - 1;
        let given = own.put(&backend, &item(1), &features(&backend, 1)).unwrap();
        assert_eq!(bits(&backend, &given), bits(&backend, &features(&backend, 1)));
        assert!(own.get(&backend, &item(1)).unwrap().is_none());
    }
}
