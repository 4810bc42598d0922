//! The pager on NATS: reads of pages by executors elsewhere, and leases by the schedulers that run their jobs.

use std::sync::Arc;

use bytes::Bytes;
use millrace_bus::{Bus, Incoming};
use millrace_pager::{PageStore, PagerError};
use millrace_protocol::pages::{PageLease, PageRead};
use millrace_runtime::Clock;

/// Answers for one page store. Clones share it.
#[derive(Clone)]
pub struct PageService {
    /// The pages.
    pub store: Arc<PageStore>,
    /// Connection.
    pub bus: Bus,
    /// Time.
    pub clock: Clock,
}

impl PageService {
    /// Answers one read. The disk is read where blocking is allowed.
    pub async fn read(self, request: Incoming) {
        let answer = match postcard::from_bytes::<PageRead>(&request.payload) {
            Err(error) => Err((400, format!("not a page read: {error}"))),
            Ok(read) => {
                let store = Arc::clone(&self.store);
                let bytes = tokio::task::spawn_blocking(move || store.read(read.page, read.offset, read.length)).await;
                bytes.map_or_else(|ended| Err((500, ended.to_string())), |read| read.map_err(|error| named(&error)))
            }
        };
        if let Err(error) = self.answer(&request, answer).await {
            tracing::warn!(%error, "page read not answered");
        }
    }

    /// Follows one lease message.
    pub fn lease(&self, message: &Incoming) {
        match postcard::from_bytes::<PageLease>(&message.payload) {
            Ok(PageLease::Renew(jobs)) => {
                self.store.renew(&jobs, self.clock.now());
            }
            Ok(PageLease::Release(job)) => {
                self.store.release(&job);
            }
            Err(error) => tracing::warn!(%error, "page lease ignored"),
        }
    }

    /// Frees the pages of jobs that nobody renewed.
    pub fn expire(&self) {
        for job in self.store.expire(self.clock.now()) {
            tracing::warn!(%job, "pages freed: nobody renewed their lease");
        }
    }

    async fn answer(
        &self,
        request: &Incoming,
        answer: Result<Bytes, (u16, String)>,
    ) -> Result<(), millrace_bus::BusError> {
        match answer {
            Ok(bytes) => self.bus.reply(request, bytes).await,
            Err((code, text)) => self.bus.reply_error(request, code, &text).await,
        }
    }
}

fn named(error: &PagerError) -> (u16, String) {
    let code = if matches!(error, PagerError::Missing(_)) { 404 } else { 500 };
    (code, error.to_string())
}
