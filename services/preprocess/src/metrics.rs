//! The preprocess actor's metric families. Names and buckets stand here and nowhere else.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

/// Metrics of one preprocess actor, handed to it as a value.
#[derive(Debug, Clone)]
pub struct PreprocessMetrics {
    /// Jobs taken from the work queue, by class.
    pub pulled: IntCounterVec,
    /// Jobs that ended here, by status.
    pub finished: IntCounterVec,
    /// The same, by error code.
    pub errors: IntCounterVec,
    /// Deliveries that were of no use: ended before, second submissions, owned by others.
    pub settled: IntCounterVec,
    /// Jobs held here, by class.
    pub held: IntGaugeVec,
    /// Time from delivery to the first offer.
    pub prepare_seconds: Histogram,
    /// Time from the first offer to its acceptance.
    pub offer_seconds: Histogram,
    /// Offers, by answer.
    pub offers: IntCounterVec,
    /// Images and frames resized.
    pub frames: IntCounter,
    /// Bytes of pages in memory.
    pub page_ram_bytes: IntGauge,
    /// Bytes of pages on disk.
    pub page_disk_bytes: IntGauge,
    /// Pages held.
    pub pages: IntGauge,
    /// Pages moved from memory to disk.
    pub page_spills: IntGauge,
    /// Pages whose checksum was wrong when read back.
    pub pages_corrupt: IntGauge,
}

impl PreprocessMetrics {
    /// Creates and registers the families.
    ///
    /// # Errors
    /// If a family is registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let make = Maker { registry };
        Ok(Self {
            pulled: make.counters("jobs_pulled_total", "Jobs taken from the work queue, by class", "class")?,
            finished: make.counters("jobs_finished_total", "Jobs that ended in preprocessing, by status", "status")?,
            errors: make.counters("errors_total", "Jobs that ended in preprocessing, by error code", "code")?,
            settled: make.counters("jobs_settled_total", "Deliveries that were of no use, by reason", "reason")?,
            held: make.gauges("jobs_held", "Jobs held by this actor, by class", "class")?,
            prepare_seconds: make.seconds("prepare_seconds", "Time from a job's delivery to its first offer")?,
            offer_seconds: make.seconds("offer_seconds", "Time from a job's first offer to its acceptance")?,
            offers: make.counters("offers_total", "Offers to schedulers, by answer", "answer")?,
            frames: make.counter("frames_total", "Images and video frames resized")?,
            page_ram_bytes: make.gauge("page_ram_bytes", "Bytes of tensor pages in memory")?,
            page_disk_bytes: make.gauge("page_disk_bytes", "Bytes of tensor pages on disk")?,
            pages: make.gauge("pages", "Tensor pages held")?,
            page_spills: make.gauge("page_spills", "Tensor pages moved from memory to disk since start")?,
            pages_corrupt: make.gauge("pages_corrupt", "Tensor pages with a wrong checksum since start")?,
        })
    }
}

struct Maker<'a> {
    registry: &'a Registry,
}

impl Maker<'_> {
    fn keep<C: prometheus::core::Collector + Clone + 'static>(&self, made: C) -> prometheus::Result<C> {
        self.registry.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.keep(IntCounter::new(full(name), help)?)
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> prometheus::Result<IntCounterVec> {
        self.keep(IntCounterVec::new(Opts::new(full(name), help), &[label])?)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.keep(IntGauge::new(full(name), help)?)
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> prometheus::Result<IntGaugeVec> {
        self.keep(IntGaugeVec::new(Opts::new(full(name), help), &[label])?)
    }

    fn seconds(&self, name: &str, help: &str) -> prometheus::Result<Histogram> {
        let buckets = prometheus::exponential_buckets(0.001, 2.0, 16)?;
        self.keep(Histogram::with_opts(HistogramOpts::new(full(name), help).buckets(buckets))?)
    }
}

fn full(name: &str) -> String {
    format!("millrace_preprocess_{name}")
}
