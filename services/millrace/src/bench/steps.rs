//! What the executor of this process did in the meantime: times of its steps and of the gaps between them.

use std::time::Duration;

use millrace_executor::metrics::{STEP_BUSY_SECONDS, STEP_IDLE_SECONDS};
use millrace_telemetry::Registry;
use serde::Serialize;

/// How often the registry is read until the first step.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Totals of a histogram: how many observations were at most each bound, their number and their sum.
#[derive(Debug, Clone, Default, PartialEq)]
struct Totals {
    bounds: Vec<(f64, u64)>,
    count: u64,
    sum: f64,
}

/// Both histograms at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    busy: Totals,
    idle: Totals,
}

/// Steps between two snapshots.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Steps {
    /// Steps computed.
    pub count: u64,
    /// Mean time of a step, in milliseconds.
    pub busy_mean_ms: f64,
    /// Share of the time between steps in which the device waited for a plan.
    pub idle_share: f64,
    /// Steps by time: upper bound in milliseconds, number.
    pub histogram: Vec<(f64, u64)>,
}

impl Snapshot {
    /// Reads the registry.
    pub fn of(registry: &Registry) -> Self {
        Self { busy: totals(registry, STEP_BUSY_SECONDS), idle: totals(registry, STEP_IDLE_SECONDS) }
    }

    /// Waits for the first step after `before`: what the device waited until then was for work, not for a plan.
    pub async fn begun(registry: Registry, before: Self) -> Self {
        loop {
            let now = Self::of(&registry);
            if now.busy.count > before.busy.count {
                return now;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// What happened since `before`; `None` if no step was computed here. Idle time counts from `begun` on.
    pub fn since(&self, before: &Self, begun: &Self) -> Option<Steps> {
        let count = self.busy.count.checked_sub(before.busy.count).filter(|count| *count > 0)?;
        let busy = self.busy.sum - before.busy.sum;
        let idle = self.idle.sum - begun.idle.sum;
        let earlier = |number: usize| before.busy.bounds.get(number).map_or(0, |(_, below)| *below);
        let mut below = 0;
        let mut histogram = Vec::new();
        for (number, (bound, upto)) in self.busy.bounds.iter().enumerate() {
            let upto = upto.saturating_sub(earlier(number));
            if upto > below {
                histogram.push((bound * 1000.0, upto - below));
            }
            below = upto;
        }
        #[allow(clippy::cast_precision_loss)] // A count of steps, for a mean.
        let busy_mean_ms = busy * 1000.0 / count as f64;
        Some(Steps { count, busy_mean_ms, idle_share: idle / (busy + idle), histogram })
    }
}

fn totals(registry: &Registry, name: &str) -> Totals {
    let families = registry.gather();
    let Some(family) = families.iter().find(|family| family.name() == name) else { return Totals::default() };
    let Some(metric) = family.get_metric().first() else { return Totals::default() };
    let histogram = metric.get_histogram();
    let bounds = histogram.get_bucket().iter().map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()));
    Totals { bounds: bounds.collect(), count: histogram.get_sample_count(), sum: histogram.get_sample_sum() }
}

#[cfg(test)]
mod tests {
    use millrace_executor::ExecutorMetrics;

    use super::*;

    #[test]
    fn steps_between_two_moments() {
        let registry = Registry::new();
        let metrics = ExecutorMetrics::register(&registry).unwrap();
        metrics.busy_seconds.observe(0.5);
        let before = Snapshot::of(&registry);
        assert_eq!(Snapshot::of(&registry).since(&before, &before), None);
        for seconds in [0.001, 0.001, 0.007] {
            metrics.busy_seconds.observe(seconds);
        }
        metrics.idle_seconds.observe(0.5);
        let begun = Snapshot::of(&registry);
        metrics.idle_seconds.observe(0.001);
        let steps = Snapshot::of(&registry).since(&before, &begun).unwrap();
        assert_eq!((steps.count, steps.histogram.iter().map(|(_, n)| n).sum::<u64>()), (3, 3));
        assert!((steps.busy_mean_ms - 3.0).abs() < 1e-9 && (steps.idle_share - 0.1).abs() < 1e-9, "{steps:?}");
        assert_eq!(steps.histogram.len(), 2, "{steps:?}");
    }
}
