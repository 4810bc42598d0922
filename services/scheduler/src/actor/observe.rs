//! What the actor shows of itself: a snapshot for tests and the admin page, and its gauges.

use actix::prelude::*;
use serde::Serialize;

use super::SchedulerActor;
use crate::policy::Counts;

/// State of a scheduler at one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Snapshot {
    /// This incarnation.
    pub id: String,
    /// The model it schedules.
    pub model: String,
    /// The executor it holds.
    pub executor: Option<String>,
    /// Session with it.
    pub session: Option<u64>,
    /// Executors of the model that live.
    pub executors: usize,
    /// Jobs held, those whose final is still to be stored included.
    pub jobs: usize,
    /// Jobs that would be accepted now.
    pub free_jobs: usize,
    /// Counts of the policy.
    pub counts: Counts,
    /// What is wrong with the policy's books, if anything is.
    pub imbalance: Option<String>,
    /// Whether it drains.
    pub draining: bool,
}

/// Asks for a [`Snapshot`].
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "Snapshot")]
pub struct Observe;

impl SchedulerActor {
    /// State now. Proves the books on the way.
    pub fn observable(&self) -> Snapshot {
        let attached = self.executors.attached.as_ref();
        Snapshot {
            id: self.id.to_string(),
            model: self.model.to_string(),
            executor: attached.map(|attached| attached.executor.to_string()),
            session: attached.map(|attached| attached.session),
            executors: self.executors.living(self.now()),
            jobs: self.held.len(),
            free_jobs: self.free_jobs(),
            counts: self.planner.counts(),
            imbalance: self.planner.check().err().map(|error| error.to_string()),
            draining: self.drain.is_draining(),
        }
    }

    /// Sets the gauges; when nothing runs, also proves the books.
    pub(super) fn set_gauges(&mut self) {
        let counts = self.planner.counts();
        let total = counts.total_blocks.max(1) as f64;
        self.metrics.waiting.set(counts.waiting as i64);
        self.metrics.running.set(counts.running as i64);
        self.metrics.outstanding.set(counts.outstanding as i64);
        self.metrics.blocks_used.set((counts.total_blocks - counts.free_blocks) as f64 / total);
        self.metrics.blocks_cached.set(counts.cached_blocks as f64 / total);
        if counts.running == 0 && !self.books_proven {
            self.books_proven = true;
            if let Err(error) = self.planner.check() {
                let _ = self.fatal.send(Some(error.to_string()));
            }
        }
    }
}

impl Handler<Observe> for SchedulerActor {
    type Result = MessageResult<Observe>;

    fn handle(&mut self, _: Observe, _ctx: &mut Self::Context) -> Self::Result {
        MessageResult(self.observable())
    }
}
