//! The output log of one job: an ordered writer that stores claim, deltas and final behind one another, each only if
//! nobody else wrote meanwhile. While one append is under way further deltas merge, so a job's tokens are the only bound
//! it needs. Must not decide what is written.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use millrace_bus::{AppendError, Bus, BusError, Kind};
use millrace_protocol::output::{Final, Status};
use millrace_protocol::pages::PageLease;
use millrace_protocol::ready::Delivery;
use millrace_protocol::{ActorId, Chunk, ErrorCode, JobError, JobId, OutputChunk, SCHEMA_VERSION};
use millrace_runtime::{Backoff, BackoffPolicy};
use tokio::sync::Notify;

use crate::emit::Delta;
use crate::metrics::ModelMetrics;

const RETRY: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(20),
    longest: Duration::from_secs(1),
    healthy_after: Duration::from_secs(5),
};

/// How a job leaves this scheduler.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// With its terminal message.
    Final(Box<Final>),
    /// Back to the queue, for another scheduler to continue behind what is stored.
    Return {
        /// When the queue may deliver it again.
        delay: Duration,
    },
}

/// How the writer ended.
#[derive(Debug, Clone)]
pub enum Ended {
    /// The final is stored and the job acknowledged.
    Stored,
    /// The job is back in the queue.
    Returned,
    /// Another owner wrote: the job is not ours any more.
    Stale,
    /// The bus refuses the job's output for good; the queue will deliver the job again.
    Refused(BusError),
    /// The writer itself failed.
    Crashed(String),
}

/// Who answers for the job at the queue, and who holds its pages. A redelivery replaces the former and adds to the latter.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The newest delivery.
    pub delivery: Delivery,
    /// Preprocess actors that hold pages of the job.
    pub nodes: Vec<ActorId>,
}

#[derive(Debug)]
struct Outbox {
    delta: Delta,
    end: Option<End>,
    origin: Origin,
}

#[derive(Debug)]
struct Shared {
    outbox: Mutex<Outbox>,
    woken: Notify,
}

/// The actor's end of a job's log. None of its calls waits.
#[derive(Debug, Clone)]
pub struct JobLog {
    shared: Arc<Shared>,
}

impl JobLog {
    /// A log whose writer is still to be started.
    pub fn new(origin: Origin) -> Self {
        let outbox = Outbox { delta: Delta::default(), end: None, origin };
        Self { shared: Arc::new(Shared { outbox: Mutex::new(outbox), woken: Notify::new() }) }
    }

    /// Appends new text to what is to be written.
    pub fn push(&self, delta: Delta) {
        self.outbox().delta.merge(delta);
        self.shared.woken.notify_one();
    }

    /// Ends the log behind everything pushed so far. The first end counts.
    pub fn end(&self, end: End) {
        self.outbox().end.get_or_insert(end);
        self.shared.woken.notify_one();
    }

    /// Takes a redelivery over.
    pub fn adopt(&self, delivery: Delivery, node: ActorId) {
        let mut outbox = self.outbox();
        outbox.origin.delivery = delivery;
        if !outbox.origin.nodes.contains(&node) {
            outbox.origin.nodes.push(node);
        }
    }

    /// Who answers for the job now.
    pub fn origin(&self) -> Origin {
        self.outbox().origin.clone()
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.shared.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes one job's log.
pub struct Writer {
    /// NATS.
    pub bus: Bus,
    /// The job.
    pub job: JobId,
    /// Who writes.
    pub owner: ActorId,
    /// What is written.
    pub log: JobLog,
    /// Whether deltas are written, or only the final.
    pub stream: bool,
    /// Least time between two deltas.
    pub gap: Duration,
    /// Sequence of the last stored message: the fence.
    pub last_seq: u64,
    /// Answer tokens stored so far.
    pub index: u64,
    /// Counters.
    pub metrics: ModelMetrics,
}

impl Writer {
    /// Claims the job, then writes until it ends.
    pub async fn run(mut self) -> Ended {
        match self.write().await {
            Ok(ended) => ended,
            Err(AppendError::Stale) => Ended::Stale,
            Err(AppendError::Bus(error)) => Ended::Refused(error),
        }
    }

    async fn write(&mut self) -> Result<Ended, AppendError> {
        let delivery = self.log.origin().delivery;
        let claim = Chunk::Claim { owner: self.owner.clone(), job_seq: delivery.job_seq, attempt: delivery.attempt };
        self.append(claim).await?;
        loop {
            let (delta, end) = self.take();
            if let Some(delta) = delta {
                self.append_delta(delta).await?;
            }
            match end {
                Some(End::Final(last)) => return self.finish(last).await,
                Some(End::Return { delay }) => return Ok(self.give_back(delay).await),
                None => self.log.shared.woken.notified().await,
            }
        }
    }

    /// What there is to write now. Without streaming, deltas stay until the final takes their log-probabilities.
    fn take(&self) -> (Option<Delta>, Option<End>) {
        let mut outbox = self.log.outbox();
        let mut end = outbox.end.take();
        if self.stream || matches!(end, Some(End::Return { .. })) {
            let delta = std::mem::take(&mut outbox.delta);
            return ((!delta.is_empty()).then_some(delta), end);
        }
        if let Some(End::Final(last)) = &mut end {
            last.logprobs = std::mem::take(&mut outbox.delta).logprobs;
        }
        (None, end)
    }

    async fn append_delta(&mut self, delta: Delta) -> Result<(), AppendError> {
        let tokens = delta.token_ids.len() as u64;
        let Delta { token_ids, text, logprobs } = delta;
        self.append(Chunk::Delta { token_ids, text, logprobs }).await?;
        self.index += tokens;
        if !self.gap.is_zero() && self.log.outbox().end.is_none() {
            // An end cuts the wait short; deltas do not, they merge meanwhile.
            let _ = tokio::time::timeout(self.gap, self.ended()).await;
        }
        Ok(())
    }

    async fn ended(&self) {
        while self.log.outbox().end.is_none() {
            self.log.shared.woken.notified().await;
        }
    }

    async fn finish(&mut self, last: Box<Final>) -> Result<Ended, AppendError> {
        match self.append(Chunk::Final(last.clone())).await {
            Err(AppendError::Bus(error @ BusError::TooLarge { .. })) => {
                let last = too_large(*last, &error);
                self.append(Chunk::Final(Box::new(last))).await?;
            }
            other => other?,
        }
        self.release_pages().await;
        self.acknowledge().await;
        Ok(Ended::Stored)
    }

    /// The final is stored, so a lost acknowledgement costs one redelivery that finds it.
    async fn acknowledge(&self) {
        let delivery = self.log.origin().delivery;
        let mut backoff = Backoff::new(RETRY);
        while let Err(error) = self.bus.ack_final(&delivery.ack_subject).await {
            if error.kind() != Kind::Retry || backoff.tries() > 20 {
                tracing::warn!(job = %self.job, %error, "job not acknowledged; its redelivery will find the final");
                return;
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    async fn give_back(&self, delay: Duration) -> Ended {
        let delivery = self.log.origin().delivery;
        self.release_pages().await;
        if let Err(error) = self.bus.nak(&delivery.ack_subject, delay).await {
            tracing::warn!(job = %self.job, %error, "job not returned; it is delivered again after its ack wait");
        }
        Ended::Returned
    }

    /// Lets nodes free the job's pages, before the queue can give the job to one of them again: a release that came later
    /// would take its new pages. If the message is lost, the lease runs out.
    async fn release_pages(&self) {
        let Ok(body) = postcard::to_stdvec(&PageLease::Release(self.job.clone())) else { return };
        let body = Bytes::from(body);
        for node in self.log.origin().nodes {
            if let Err(error) = self.bus.publish(&self.bus.subjects().page_lease(&node), body.clone()).await {
                tracing::debug!(job = %self.job, %node, %error, "pages not released; their lease will run out");
            }
        }
    }

    /// Appends one chunk, however long the bus is away. Ends early only if another owner wrote or the bus refuses it.
    async fn append(&mut self, chunk: Chunk) -> Result<(), AppendError> {
        let chunk = OutputChunk { v: SCHEMA_VERSION, job: self.job.clone(), index: self.index, chunk };
        let mut backoff = Backoff::new(RETRY);
        loop {
            match self.bus.append(&self.job, self.last_seq, &chunk).await {
                Ok(sequence) => {
                    self.last_seq = sequence;
                    return Ok(());
                }
                Err(AppendError::Bus(error)) if error.kind() == Kind::Retry => {
                    self.metrics.append_retries.inc();
                    tracing::warn!(job = %self.job, %error, "output not stored; trying again");
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// What is stored instead of a final that the bus does not take.
fn too_large(last: Final, error: &BusError) -> Final {
    let error = JobError::new(ErrorCode::TooLarge, format!("the answer is too large to store: {error}"));
    Final { error: Some(error), usage: last.usage, timings: last.timings, ..Final::bare(Status::Failed) }
}
