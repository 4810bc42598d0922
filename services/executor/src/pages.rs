//! Tensor pages for the engine: from the pager of this process where it holds them, else read over NATS in pieces.
//!
//! Reads over NATS start when a plan opens the sequence and are awaited when the device first needs the page, so that the
//! transfer hides behind earlier steps.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use millrace_bus::Bus;
use millrace_pager::PageStore;
use millrace_protocol::pages::PageRead;
use millrace_protocol::{ErrorCode, JobError, PageRef};
use millrace_runtime::Clock;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::engine::MediaSource;
use crate::metrics::ExecutorMetrics;

/// Bytes asked for at once: well below the server's message limit, large enough to make the round trip cheap.
const PIECE_BYTES: u32 = 512 * 1024;
/// Pieces of one page under way at once.
const PIECES_AHEAD: usize = 4;
/// Longest wait for one piece.
const PIECE_TIMEOUT: Duration = Duration::from_secs(5);

type Read = JoinHandle<Result<Bytes, JobError>>;

/// Reads pages. Clones share what is under way.
#[derive(Clone)]
pub struct PageReader {
    local: Option<Arc<PageStore>>,
    bus: Bus,
    clock: Clock,
    runtime: Handle,
    under_way: Arc<Mutex<HashMap<PageRef, Read>>>,
    metrics: ExecutorMetrics,
}

impl PageReader {
    /// A reader that runs its transfers on `runtime`; `local` is the pager of the same process, if it has one.
    pub fn new(
        bus: Bus,
        local: Option<Arc<PageStore>>,
        clock: Clock,
        runtime: Handle,
        metrics: ExecutorMetrics,
    ) -> Self {
        Self { local, bus, clock, runtime, under_way: Arc::default(), metrics }
    }

    /// Starts reading a page that a sequence will need.
    pub fn begin(&self, page: &PageRef) {
        if self.is_local(page) {
            return;
        }
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.entry(page.clone()).or_insert_with(|| self.spawn(page));
    }

    /// Stops reading pages that nobody needs any more.
    pub fn forget<'p>(&self, pages: impl IntoIterator<Item = &'p PageRef>) {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        for page in pages {
            if let Some(read) = under_way.remove(page) {
                read.abort();
            }
        }
    }

    fn is_local(&self, page: &PageRef) -> bool {
        self.local.as_ref().is_some_and(|store| *store.node() == page.node)
    }

    fn spawn(&self, page: &PageRef) -> Read {
        self.runtime.spawn(remote(self.bus.clone(), page.clone()))
    }

    fn read(&self, page: &PageRef) -> Result<Bytes, JobError> {
        if let Some(store) = self.local.as_ref().filter(|store| *store.node() == page.node) {
            return store.get(page.page).map_err(|error| lost(page, &error.to_string()));
        }
        let read = self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(page);
        let read = read.unwrap_or_else(|| self.spawn(page));
        self.runtime.block_on(read).unwrap_or_else(|ended| Err(lost(page, &ended.to_string())))
    }
}

impl MediaSource for PageReader {
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError> {
        let started = self.clock.now();
        let bytes = self.read(page)?;
        let place = if self.is_local(page) { "local" } else { "remote" };
        self.metrics.page_bytes.with_label_values(&[place]).inc_by(bytes.len() as u64);
        self.metrics.page_seconds.observe(self.clock.now().saturating_duration_since(started).as_secs_f64());
        Ok(bytes)
    }
}

/// All pieces of a page, checked against its hash.
async fn remote(bus: Bus, page: PageRef) -> Result<Bytes, JobError> {
    use futures::stream::{self, StreamExt, TryStreamExt};
    let subject = bus.subjects().page_read(&page.node);
    let starts = (0..page.bytes).step_by(PIECE_BYTES as usize);
    let pieces = stream::iter(starts).map(|offset| {
        let (bus, subject, page) = (&bus, &subject, &page);
        async move {
            let read = PageRead { page: page.page, offset, length: PIECE_BYTES };
            let request = postcard::to_stdvec(&read).map_err(|error| lost(page, &error.to_string()))?;
            let piece = bus.request(subject, request.into(), PIECE_TIMEOUT).await;
            piece.map_err(|error| lost(page, &error.to_string()))
        }
    });
    let mut whole = BytesMut::with_capacity(usize::try_from(page.bytes).unwrap_or(0));
    let mut pieces = pieces.buffered(PIECES_AHEAD);
    while let Some(piece) = pieces.try_next().await? {
        whole.extend_from_slice(&piece);
    }
    let hash = blake3::hash(&whole);
    if hash.as_bytes()[..16] != page.hash {
        return Err(lost(&page, "its content does not match its checksum"));
    }
    Ok(whole.freeze())
}

fn lost(page: &PageRef, why: &str) -> JobError {
    let text = format!("page {} of node {} cannot be read: {why}", page.page, page.node);
    JobError::new(ErrorCode::PageLost, text)
}
