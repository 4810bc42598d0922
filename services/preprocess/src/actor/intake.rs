//! One delivered job on its way to a scheduler, or to its end here. Every path out of [`Intake::take`] either hands the
//! delivery over, stores a terminal message and acknowledges, or lets the delivery come again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use millrace_bus::{Bus, BusError, JobDelivery};
use millrace_pager::{PageStore, PagerError};
use millrace_protocol::ready::{MediaItem, Offer, OfferReply, ReadyJob, Shown};
use millrace_protocol::{ActorId, Class, ErrorCode, JobError, JobId, JobRequest, ModelName};
use millrace_runtime::{Backoff, BackoffPolicy, Clock, Credit};
use tokio::sync::Notify;

use super::cancellations::Cancellations;
use super::deliveries::Deliveries;
use super::ending::{Ended, Ending};
use super::history::{self, History};
use super::media::BusMedia;
use super::routing::{PromptKeys, Schedulers};
use crate::cores::Cores;
use crate::metrics::PreprocessMetrics;
use crate::prepare::{Prepared, Preparer};

/// Longest wait for a scheduler's answer to an offer.
const OFFER_TIMEOUT: Duration = Duration::from_secs(5);
/// Without news the table of schedulers is looked at again after this long.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Waits for room in the pager.
const PAGES_RETRY: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(20),
    longest: Duration::from_millis(500),
    healthy_after: Duration::from_secs(30),
};

/// Everything that taking jobs in needs; shared by all jobs of one actor.
pub struct Intake {
    /// This incarnation, and the node of its pages.
    pub id: ActorId,
    /// Connection.
    pub bus: Bus,
    /// Time.
    pub clock: Clock,
    /// Served models.
    pub models: HashMap<ModelName, Arc<Preparer>>,
    /// Tensor pages.
    pub pages: Arc<PageStore>,
    /// Threads for work that keeps a core busy.
    pub cores: Cores,
    /// Most deliveries of one job.
    pub max_attempts: u32,
    /// Live schedulers.
    pub schedulers: Mutex<Schedulers>,
    /// Told when room appears.
    pub room: Notify,
    /// Heartbeats.
    pub deliveries: Deliveries,
    /// Cancellations.
    pub cancellations: Cancellations,
    /// Terminal messages.
    pub ending: Ending,
    /// Metrics.
    pub metrics: PreprocessMetrics,
}

/// Who a delivery is about, and what its job has shown so far.
struct Identified {
    job: JobId,
    model: ModelName,
    class: Class,
    shown: Shown,
}

impl Intake {
    /// Takes one delivery to its end here. The credit is held until then.
    pub async fn take(self: Arc<Self>, delivery: JobDelivery, credit: Credit) {
        let _credit = credit;
        let _held = self.deliveries.hold(&delivery.delivery.ack_subject);
        let Some(who) = self.identify(&delivery).await else { return };
        let mut listening = self.cancellations.listen(&who.job);
        let mut metadata = None;
        let outcome = tokio::select! {
            outcome = self.bring(&delivery, &who, &mut metadata) => outcome,
            () = listening.cancelled() => Err(cancelled()),
        };
        let Err(error) = outcome else { return };
        self.pages.release(&who.job);
        if error.code == ErrorCode::Poison {
            let label = error.code.as_str();
            let body = delivery.payload.clone();
            if let Err(failed) = self.bus.dead_letter(label, who.job.as_str(), &error.message, body).await {
                tracing::error!(job = %who.job, %failed, "dead letter not stored");
            }
        }
        let ended = Ended { job: &who.job, delivery: &delivery.delivery, shown: &who.shown, metadata, error };
        self.ending.end(ended).await;
    }

    /// Reads subject and history. `None`: the delivery is dealt with, or comes again.
    async fn identify(&self, delivery: &JobDelivery) -> Option<Identified> {
        let Some(subject) = self.bus.subjects().parse_job(&delivery.subject) else {
            self.bury(delivery).await;
            return None;
        };
        let chunks = match self.bus.out_read(&subject.job).await {
            Ok(chunks) => chunks,
            Err(error) => {
                tracing::warn!(job = %subject.job, %error, "output not readable; the job comes again");
                return None;
            }
        };
        let reason = match history::read(&chunks, delivery.delivery.job_seq) {
            History::Continue(shown) => {
                return Some(Identified { job: subject.job, model: subject.model, class: subject.class, shown });
            }
            History::Ended => "ended",
            History::SecondSubmission => "second_submission",
        };
        self.metrics.settled.with_label_values(&[reason]).inc();
        self.ending.acknowledge(&delivery.delivery).await;
        None
    }

    /// A message without a job id has no output subject to answer on: it goes to the dead letters.
    async fn bury(&self, delivery: &JobDelivery) {
        let reason = format!("subject `{}` is not `<prefix>.v1.jobs.<class>.<model>.<job>`", delivery.subject);
        let label = ErrorCode::BadRequest.as_str();
        let name = format!("seq-{}", delivery.delivery.job_seq);
        match self.bus.dead_letter(label, &name, &reason, delivery.payload.clone()).await {
            Ok(_) => {
                self.metrics.errors.with_label_values(&[label]).inc();
                self.ending.acknowledge(&delivery.delivery).await;
            }
            Err(error) => tracing::error!(%error, %reason, "dead letter not stored; the message comes again"),
        }
    }

    /// Prepares the job and hands it over.
    async fn bring(
        &self,
        delivery: &JobDelivery,
        who: &Identified,
        metadata: &mut Option<serde_json::Value>,
    ) -> Result<(), JobError> {
        let started = self.clock.now();
        let attempt = delivery.delivery.attempt;
        if attempt > self.max_attempts {
            let text =
                format!("delivered {attempt} times without an end ([streams] max_attempts = {})", self.max_attempts);
            return Err(JobError::new(ErrorCode::Poison, text));
        }
        match self.bus.is_cancelled(&who.job).await {
            Ok(true) => return Err(cancelled()),
            Ok(false) => {}
            // The live broadcast still reaches the job.
            Err(error) => tracing::warn!(job = %who.job, %error, "tombstone not readable"),
        }
        let request = parse(&delivery.payload)?;
        metadata.clone_from(&request.metadata);
        check_identity(&request, who)?;
        let deadline = request.deadline_unix_ms;
        let work = async {
            let preparer = self.models.get(&who.model).ok_or_else(|| self.unknown(&who.model))?;
            let prepared = self.prepare(preparer, &request, &who.job).await?;
            let media = self.store_pages(&who.job, &prepared).await?;
            let took = self.clock.now().saturating_duration_since(started);
            self.metrics.prepare_seconds.observe(took.as_secs_f64());
            let ready = ready_job(&request, who, prepared, media, took)?;
            let offer =
                Offer { ready, delivery: delivery.delivery.clone(), shown: who.shown.clone(), from: self.id.clone() };
            self.hand_over(&who.model, &offer).await
        };
        match deadline {
            None => work.await,
            Some(deadline) => {
                let left = Duration::from_millis(deadline.saturating_sub(self.clock.unix_ms()));
                tokio::time::timeout(left, work).await.unwrap_or_else(|_| Err(late(deadline)))
            }
        }
    }

    fn unknown(&self, model: &ModelName) -> JobError {
        let mut served: Vec<&str> = self.models.keys().map(ModelName::as_str).collect();
        served.sort_unstable();
        let text = format!("model `{model}` is not served; served are: {}", served.join(", "));
        JobError::new(ErrorCode::UnknownModel, text)
    }

    async fn prepare(&self, preparer: &Arc<Preparer>, request: &JobRequest, job: &JobId) -> Result<Prepared, JobError> {
        let gathered = preparer.gather(request, &BusMedia { bus: self.bus.clone() }).await?;
        let (preparer, request, job) = (Arc::clone(preparer), request.clone(), job.clone());
        let now = self.clock.unix_ms();
        let built = self.cores.run(move || preparer.build(&request, &job, gathered, now));
        // A panic in a decoder ends the task, not the process, and that job alone.
        built
            .await
            .unwrap_or_else(|ended| Err(JobError::new(ErrorCode::Internal, format!("preparing failed: {ended}"))))
    }

    /// Moves the patches into pages; waits while other jobs' pages fill the budgets.
    async fn store_pages(&self, job: &JobId, prepared: &Prepared) -> Result<Vec<MediaItem>, JobError> {
        let mut items = Vec::with_capacity(prepared.media.len());
        for media in &prepared.media {
            self.metrics.frames.inc_by(u64::from(media.shape.get(2).copied().unwrap_or(1)));
            let mut backoff = Backoff::new(PAGES_RETRY);
            let patches = loop {
                let (store, job, media) = (Arc::clone(&self.pages), job.clone(), media.clone());
                let now = self.clock.now();
                let put = move || store.put(&job, media.dtype, &media.shape, media.patches, now);
                let put = tokio::task::spawn_blocking(put).await;
                match put.map_err(|ended| JobError::new(ErrorCode::Internal, ended.to_string()))? {
                    Ok(page) => break page,
                    Err(PagerError::OverBudget { .. }) if self.others_hold_pages(items.len()) => {
                        tokio::time::sleep(backoff.next_delay()).await;
                    }
                    Err(error @ PagerError::OverBudget { .. }) => {
                        let text =
                            format!("{error}; raise [pager] ram_bytes or disk_bytes, or send fewer or smaller media");
                        return Err(JobError::new(ErrorCode::TooLarge, text));
                    }
                    Err(error) => return Err(JobError::new(ErrorCode::Internal, error.to_string())),
                }
            };
            items.push(MediaItem {
                start: media.start,
                tokens: media.tokens,
                grid_h: media.grid_h,
                grid_w: media.grid_w,
                patches,
                normalise: media.normalise,
            });
        }
        Ok(items)
    }

    /// Whether waiting can help: pages beside this job's own will be freed some time.
    fn others_hold_pages(&self, own: usize) -> bool {
        self.pages.counters().pages > own as u64
    }

    /// Offers the job until a scheduler owns it. `Ok` also if another owner has it.
    async fn hand_over(&self, model: &ModelName, offer: &Offer) -> Result<(), JobError> {
        let encoded = postcard::to_stdvec(offer)
            .map_err(|error| JobError::new(ErrorCode::Internal, format!("the job cannot be encoded: {error}")))?;
        let encoded = Bytes::from(encoded);
        let started = self.clock.now();
        let mut keys = PromptKeys::new(&offer.ready);
        loop {
            let scheduler = self.choose(model, &mut keys).await;
            let subject = self.bus.subjects().offer(&scheduler);
            let reply = self.bus.request(&subject, encoded.clone(), OFFER_TIMEOUT).await;
            let reply = match reply {
                Ok(bytes) => postcard::from_bytes::<OfferReply>(&bytes).map_err(|error| error.to_string()),
                Err(error @ BusError::TooLarge { .. }) => {
                    return Err(JobError::new(ErrorCode::TooLarge, error.to_string()));
                }
                Err(error) => Err(error.to_string()),
            };
            let label = match &reply {
                Ok(OfferReply::Accepted) => "accepted",
                Ok(OfferReply::Settled) => "settled",
                Ok(OfferReply::Busy) => "busy",
                Err(_) => "unanswered",
            };
            self.metrics.offers.with_label_values(&[label]).inc();
            match reply {
                Ok(OfferReply::Accepted) => {
                    let waited = self.clock.now().saturating_duration_since(started);
                    self.metrics.offer_seconds.observe(waited.as_secs_f64());
                    return Ok(());
                }
                Ok(OfferReply::Settled) => {
                    self.pages.release(&offer.ready.job);
                    return Ok(());
                }
                Ok(OfferReply::Busy) => {}
                Err(error) => tracing::warn!(job = %offer.ready.job, %scheduler, %error, "offer unanswered"),
            }
            self.table().skip(&scheduler);
        }
    }

    /// Waits for a scheduler with room.
    async fn choose(&self, model: &ModelName, keys: &mut PromptKeys<'_>) -> ActorId {
        loop {
            let news = self.room.notified();
            if let Some(scheduler) = self.table().choose(model, |beacon| keys.cached_tokens(beacon), self.clock.now()) {
                return scheduler;
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, news).await;
        }
    }

    /// The table of schedulers.
    pub fn table(&self) -> MutexGuard<'_, Schedulers> {
        self.schedulers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(payload: &[u8]) -> Result<JobRequest, JobError> {
    serde_json::from_slice(payload).map_err(|error| {
        let text = format!("the job is not a document of the job schema: {error}; see docs/asyncapi.json");
        JobError::new(ErrorCode::BadRequest, text)
    })
}

fn check_identity(request: &JobRequest, who: &Identified) -> Result<(), JobError> {
    let differs = |key: &str, body: &str, subject: &str| {
        let text = format!("`{key}` is `{body}` in the document and `{subject}` in the subject; make them equal");
        Err(JobError::new(ErrorCode::BadRequest, text))
    };
    match (&request.id, &request.model) {
        (Some(id), _) if *id != who.job => differs("id", id.as_str(), who.job.as_str()),
        (_, Some(model)) if *model != who.model => differs("model", model.as_str(), who.model.as_str()),
        _ => Ok(()),
    }
}

fn ready_job(
    request: &JobRequest,
    who: &Identified,
    prepared: Prepared,
    media: Vec<MediaItem>,
    took: Duration,
) -> Result<ReadyJob, JobError> {
    let metadata = request.metadata.as_ref().map(serde_json::to_string).transpose();
    Ok(ReadyJob {
        job: who.job.clone(),
        model: who.model.clone(),
        class: who.class,
        prompt: prepared.prompt,
        media,
        sampling: prepared.sampling,
        max_tokens: prepared.max_tokens,
        stop: prepared.stop,
        stop_token_ids: prepared.stop_token_ids,
        priority: prepared.priority,
        deadline_unix_ms: request.deadline_unix_ms,
        stream: request.stream,
        tenant: request.tenant.clone().unwrap_or_else(|| "default".into()),
        metadata_json: metadata.map_err(|error| JobError::new(ErrorCode::BadRequest, error.to_string()))?,
        preprocess_ms: took.as_secs_f64() * 1e3,
    })
}

fn cancelled() -> JobError {
    JobError::new(ErrorCode::Cancelled, "cancelled by its publisher before it ran")
}

fn late(deadline_unix_ms: u64) -> JobError {
    let text = format!("the deadline ({deadline_unix_ms} ms since 1970) passed before the job could run");
    JobError::new(ErrorCode::DeadlineExceeded, text)
}
