//! Media in one process: files for preprocessing, and prepared patches for the engine, without pager or bus.

use bytes::Bytes;
use millrace_executor::MediaSource;
use millrace_preprocess::{MediaFetch, PreparedMedia};
use millrace_protocol::ready::MediaItem;
use millrace_protocol::{ActorId, ErrorCode, JobError, PageRef};

/// Takes an object's name for a path.
pub struct Files;

impl MediaFetch for Files {
    async fn object(&self, name: &str, most_bytes: u64) -> Result<Bytes, JobError> {
        let missing = |error: std::io::Error| JobError::new(ErrorCode::MediaMissing, format!("{name}: {error}"));
        let size_bytes = tokio::fs::metadata(name).await.map_err(missing)?.len();
        if size_bytes > most_bytes {
            let text = format!("{name} has {size_bytes} bytes; at most {most_bytes} are allowed ([preprocess.limits])");
            return Err(JobError::new(ErrorCode::TooLarge, text));
        }
        tokio::fs::read(name).await.map(Bytes::from).map_err(missing)
    }
}

/// Prepared patches by page number.
pub struct Patches(Vec<Bytes>);

impl Patches {
    /// Numbers `media`, and names each by its number.
    pub fn of(media: Vec<PreparedMedia>, node: &ActorId) -> (Vec<MediaItem>, Self) {
        let (mut items, mut pages) = (Vec::new(), Vec::new());
        for item in media {
            let mut hash = [0; 16];
            hash.copy_from_slice(&blake3::hash(&item.patches).as_bytes()[..16]);
            let patches = PageRef {
                node: node.clone(),
                page: u64::try_from(pages.len()).unwrap_or(u64::MAX),
                dtype: item.dtype,
                shape: item.shape.to_vec(),
                bytes: u64::try_from(item.patches.len()).unwrap_or(u64::MAX),
                hash,
            };
            pages.push(item.patches);
            let PreparedMedia { start, tokens, grid_h, grid_w, normalise, .. } = item;
            items.push(MediaItem { start, tokens, grid_h, grid_w, patches, normalise });
        }
        (items, Self(pages))
    }
}

impl MediaSource for Patches {
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError> {
        let found = usize::try_from(page.page).ok().and_then(|page| self.0.get(page)).cloned();
        found.ok_or_else(|| JobError::new(ErrorCode::Internal, format!("no page {}", page.page)))
    }
}
