//! Every metric family of the scheduler. Families are registered once and passed as values; no other file names one.

use millrace_protocol::output::Status;
use millrace_protocol::{ErrorCode, ModelName};
use millrace_telemetry::Registry;
use millrace_telemetry::buckets::{INTER_TOKEN_SECS, JOB_SECS, STEP_SECS, STEP_TOKENS, TTFT_SECS};
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
};

/// All families, by model.
#[derive(Debug, Clone)]
pub struct SchedulerMetrics {
    waiting: IntGaugeVec,
    running: IntGaugeVec,
    outstanding: IntGaugeVec,
    blocks_used: GaugeVec,
    blocks_cached: GaugeVec,
    step_tokens: HistogramVec,
    step_secs: HistogramVec,
    starved_secs: HistogramVec,
    queue_secs: HistogramVec,
    ttft_secs: HistogramVec,
    itl_secs: HistogramVec,
    job_secs: HistogramVec,
    generated: IntCounterVec,
    prompt: IntCounterVec,
    cached: IntCounterVec,
    finished: IntCounterVec,
    errors: IntCounterVec,
    preemptions: IntCounterVec,
    sessions_lost: IntCounterVec,
    stale: IntCounterVec,
    offers: IntCounterVec,
    append_retries: IntCounterVec,
}

/// The families of one model.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    /// Jobs that wait for a slot.
    pub waiting: IntGauge,
    /// Jobs that hold a slot.
    pub running: IntGauge,
    /// Plans whose outputs are out.
    pub outstanding: IntGauge,
    /// Share of KV blocks in use.
    pub blocks_used: prometheus::Gauge,
    /// Share of KV blocks that hold reusable content.
    pub blocks_cached: prometheus::Gauge,
    /// Tokens of a step.
    pub step_tokens: Histogram,
    /// Time the device was busy with a step.
    pub step_secs: Histogram,
    /// Time the device waited for a plan.
    pub starved_secs: Histogram,
    /// From publication to the first plan.
    pub queue_secs: Histogram,
    /// From publication to the first token.
    pub ttft_secs: Histogram,
    /// Between two tokens of a job.
    pub itl_secs: Histogram,
    /// From publication to the end.
    pub job_secs: Histogram,
    /// Tokens drawn and kept.
    pub generated: IntCounter,
    /// Prompt tokens admitted.
    pub prompt: IntCounter,
    /// Prompt tokens found in the prefix cache.
    pub cached: IntCounter,
    /// Sequences that lost their slot to others.
    pub preemptions: IntCounter,
    /// Executors lost.
    pub sessions_lost: IntCounter,
    /// Jobs dropped because another owner wrote.
    pub stale: IntCounter,
    /// Appends tried again.
    pub append_retries: IntCounter,
    finished: IntCounterVec,
    errors: IntCounterVec,
    offers: IntCounterVec,
    model: String,
}

impl SchedulerMetrics {
    /// Registers every family.
    ///
    /// # Errors
    /// [`prometheus::Error`] if one of them is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let make = Make { registry };
        Ok(Self {
            waiting: make.int_gauge("waiting_jobs", "Jobs that wait for a slot")?,
            running: make.int_gauge("running_jobs", "Jobs that hold a slot")?,
            outstanding: make
                .int_gauge("outstanding_plans", "Plans whose outputs are out: how far planning runs ahead")?,
            blocks_used: make.gauge("kv_blocks_used_ratio", "Share of KV blocks that sequences hold")?,
            blocks_cached: make.gauge("kv_blocks_cached_ratio", "Share of KV blocks with reusable content")?,
            step_tokens: make.histogram("step_tokens", "Tokens computed in one step", STEP_TOKENS)?,
            step_secs: make.histogram("step_seconds", "Time the device was busy with one step", STEP_SECS)?,
            starved_secs: make.histogram("executor_idle_seconds", "Time the device waited for a plan", STEP_SECS)?,
            queue_secs: make.histogram("queue_seconds", "Time from publication to the first plan", TTFT_SECS)?,
            ttft_secs: make.histogram(
                "time_to_first_token_seconds",
                "Time from publication to the first token",
                TTFT_SECS,
            )?,
            itl_secs: make.histogram("inter_token_seconds", "Time between two tokens of a job", INTER_TOKEN_SECS)?,
            job_secs: make.histogram("job_seconds", "Time from publication to the end", JOB_SECS)?,
            generated: make.counter("generated_tokens_total", "Tokens drawn and kept", &[])?,
            prompt: make.counter("prompt_tokens_total", "Prompt tokens of admitted jobs", &[])?,
            cached: make.counter("cached_tokens_total", "Prompt tokens found in the prefix cache", &[])?,
            finished: make.counter("jobs_total", "Jobs ended, by status", &["status"])?,
            errors: make.counter("job_errors_total", "Jobs ended without a full answer, by code", &["code"])?,
            preemptions: make.counter("preemptions_total", "Sequences that lost their slot to others", &[])?,
            sessions_lost: make.counter("sessions_lost_total", "Executors lost while attached", &[])?,
            stale: make.counter("stale_writes_total", "Jobs let go because another owner wrote", &[])?,
            offers: make.counter("offers_total", "Offers received, by answer", &["answer"])?,
            append_retries: make.counter(
                "append_retries_total",
                "Appends to the output log that were tried again",
                &[],
            )?,
        })
    }

    /// The families of one model, its counters at zero.
    pub fn of(&self, model: &ModelName) -> ModelMetrics {
        let label = &[model.as_str()];
        let metrics = ModelMetrics {
            waiting: self.waiting.with_label_values(label),
            running: self.running.with_label_values(label),
            outstanding: self.outstanding.with_label_values(label),
            blocks_used: self.blocks_used.with_label_values(label),
            blocks_cached: self.blocks_cached.with_label_values(label),
            step_tokens: self.step_tokens.with_label_values(label),
            step_secs: self.step_secs.with_label_values(label),
            starved_secs: self.starved_secs.with_label_values(label),
            queue_secs: self.queue_secs.with_label_values(label),
            ttft_secs: self.ttft_secs.with_label_values(label),
            itl_secs: self.itl_secs.with_label_values(label),
            job_secs: self.job_secs.with_label_values(label),
            generated: self.generated.with_label_values(label),
            prompt: self.prompt.with_label_values(label),
            cached: self.cached.with_label_values(label),
            preemptions: self.preemptions.with_label_values(label),
            sessions_lost: self.sessions_lost.with_label_values(label),
            stale: self.stale.with_label_values(label),
            append_retries: self.append_retries.with_label_values(label),
            finished: self.finished.clone(),
            errors: self.errors.clone(),
            offers: self.offers.clone(),
            model: model.to_string(),
        };
        for status in Status::ALL {
            let _ = metrics.finished.with_label_values(&[model.as_str(), status.as_str()]);
        }
        metrics
    }
}

impl ModelMetrics {
    /// Counts a job's end.
    pub fn ended(&self, status: Status, error: Option<ErrorCode>) {
        self.finished.with_label_values(&[self.model.as_str(), status.as_str()]).inc();
        if let Some(code) = error {
            self.errors.with_label_values(&[self.model.as_str(), code.as_str()]).inc();
        }
    }

    /// Counts an answered offer.
    pub fn offer(&self, answer: &'static str) {
        self.offers.with_label_values(&[self.model.as_str(), answer]).inc();
    }
}

struct Make<'a> {
    registry: &'a Registry,
}

impl Make<'_> {
    fn name(name: &str) -> String {
        format!("millrace_scheduler_{name}")
    }

    fn int_gauge(&self, name: &str, help: &str) -> Result<IntGaugeVec, prometheus::Error> {
        let family = IntGaugeVec::new(Opts::new(Self::name(name), help), &["model"])?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(family)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<GaugeVec, prometheus::Error> {
        let family = GaugeVec::new(Opts::new(Self::name(name), help), &["model"])?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(family)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<HistogramVec, prometheus::Error> {
        let options = HistogramOpts::new(Self::name(name), help).buckets(buckets.to_vec());
        let family = HistogramVec::new(options, &["model"])?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(family)
    }

    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        let labels = [&["model"], labels].concat();
        let family = IntCounterVec::new(Opts::new(Self::name(name), help), &labels)?;
        self.registry.register(Box::new(family.clone()))?;
        Ok(family)
    }
}
