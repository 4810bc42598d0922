//! Percentiles of many values in little memory: buckets 1 % apart. Must not know what is counted.

use serde::Serialize;

/// Ratio of neighbouring buckets: the error of a percentile.
const STEP: f64 = 1.01;
/// Smallest value that is told apart from zero.
const LEAST: f64 = 1e-6;
/// Up to LEAST * STEP^2800 = 1.2e6.
const BUCKETS: usize = 2_800;

/// A histogram of non-negative values.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: f64,
    max: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], count: 0, sum: 0.0, max: 0.0 }
    }
}

impl Histogram {
    /// Counts a value.
    pub fn add(&mut self, value: f64) {
        let place = if value <= LEAST { 0.0 } else { (value / LEAST).ln() / STEP.ln() };
        self.counts[(place as usize).min(BUCKETS - 1)] += 1;
        self.count += 1;
        self.sum += value;
        self.max = self.max.max(value);
    }

    /// The value below which this share (0 to 1) of all values lies, at most 1 % too high.
    pub fn percentile(&self, share: f64) -> f64 {
        let wanted = (self.count as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (place, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && self.count > 0 {
                return (LEAST * STEP.powi(place as i32 + 1)).min(self.max);
            }
        }
        0.0
    }

    /// The usual figures.
    pub fn summary(&self) -> Summary {
        let mean = if self.count == 0 { 0.0 } else { self.sum / self.count as f64 };
        Summary {
            count: self.count,
            mean,
            p50: self.percentile(0.5),
            p90: self.percentile(0.9),
            p99: self.percentile(0.99),
            max: self.max,
        }
    }
}

/// What is reported of a histogram, in the unit of its values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Values counted.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest value.
    pub max: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_at_most_one_per_cent_too_high() {
        let mut histogram = Histogram::default();
        let mut values: Vec<f64> = (0..5_003).map(|n| 1e-5 * 1.003_f64.powi(n * 7 % 5_003)).collect();
        values.iter().for_each(|value| histogram.add(*value));
        values.sort_by(f64::total_cmp);
        for share in [0.01, 0.5, 0.9, 0.99, 1.0] {
            let exact = values[((values.len() as f64 * share).ceil() as usize).max(1) - 1];
            let found = histogram.percentile(share);
            assert!(found >= exact * 0.999_999 && found <= exact * 1.010_001, "{share}: {found} for {exact}");
        }
        assert_eq!(histogram.summary().max, values[values.len() - 1]);
        assert_eq!(Histogram::default().summary().p99, 0.0);
    }
}
