//! Lookups of vision features as metrics: the engine counts, whoever reads the metrics takes the counts over.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, Opts, Registry};

use super::ENCODER_LOOKUPS;
use crate::engine::EncoderCounts;

/// Counters of models by name.
type Counted = Vec<(String, Arc<EncoderCounts>)>;

/// The family and whose lookups it shows.
#[derive(Debug, Clone)]
pub struct EncoderMetrics {
    /// One reading at a time.
    counts: Arc<Mutex<Counted>>,
    lookups: IntCounterVec,
}

impl EncoderMetrics {
    pub(super) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let help = "Vision features looked up, by where they were; a miss runs the tower";
        let lookups = IntCounterVec::new(Opts::new(ENCODER_LOOKUPS, help), &["model", "place"])?;
        let own = Self { counts: Arc::default(), lookups };
        registry.register(Box::new(own.clone()))?;
        Ok(own)
    }

    pub(super) fn show(&self, model: &str, counts: Arc<EncoderCounts>) {
        let mut known = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(name, _)| name != model);
        known.push((model.to_owned(), counts));
    }
}

impl Collector for EncoderMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.lookups.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for (model, counts) in &*self.counts.lock().unwrap_or_else(PoisonError::into_inner) {
            for (place, count) in [("device", &counts.device), ("host", &counts.host), ("miss", &counts.misses)] {
                let shown = self.lookups.with_label_values(&[model.as_str(), place]);
                shown.inc_by(count.load(Ordering::Relaxed).saturating_sub(shown.get()));
            }
        }
        self.lookups.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::ExecutorMetrics;

    #[test]
    fn lookups_are_shown_by_place() {
        let registry = Registry::new();
        let metrics = ExecutorMetrics::register(&registry).unwrap();
        let counts = Arc::new(EncoderCounts::default());
        metrics.show_encoder("tiny", counts.clone());
        counts.host.store(2, Ordering::Relaxed);
        counts.misses.store(5, Ordering::Relaxed);
        let shown = || {
            let families = registry.gather().into_iter().filter(|family| family.name() == ENCODER_LOOKUPS);
            prometheus::TextEncoder::new().encode_to_string(&families.collect::<Vec<_>>()).unwrap()
        };
        let text = "\
# HELP millrace_executor_encoder_lookups_total Vision features looked up, by where they were; a miss runs the tower
# TYPE millrace_executor_encoder_lookups_total counter
millrace_executor_encoder_lookups_total{model=\"tiny\",place=\"device\"} 0
millrace_executor_encoder_lookups_total{model=\"tiny\",place=\"host\"} 2
millrace_executor_encoder_lookups_total{model=\"tiny\",place=\"miss\"} 5
";
        assert_eq!(shown(), text);
        counts.host.store(3, Ordering::Relaxed);
        assert_eq!(shown(), text.replace("\"host\"} 2", "\"host\"} 3"));
    }
}
