//! What arrives when: traces of arrivals and distributions of lengths. Every job follows from the seed and its number, so
//! that nothing has to be kept. Must not know engines.

use std::f64::consts::TAU;
use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};

/// When jobs arrive.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrivals {
    /// All at once.
    AtOnce,
    /// Independently of each other.
    Poisson {
        /// Mean jobs per second.
        per_sec: f64,
    },
    /// Groups of jobs at one moment, the groups independent of each other.
    Bursty {
        /// Mean jobs per second over all bursts.
        per_sec: f64,
        /// Mean jobs of a burst.
        burst: f64,
    },
    /// A Poisson process whose rate swings between 10 % and 190 % of its mean.
    Diurnal {
        /// Mean jobs per second.
        per_sec: f64,
        /// Seconds from peak to peak.
        period_secs: f64,
    },
}

/// How long something is, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// Always the same.
    Fixed(u32),
    /// Evenly between two numbers, both included.
    Uniform(u32, u32),
    /// Pareto: most are near `least`, a few are very long.
    HeavyTail {
        /// Smallest.
        least: u32,
        /// Largest.
        most: u32,
        /// Exponent of the tail; below 2 the variance is without bound.
        alpha: f64,
    },
}

impl Length {
    fn draw(self, rng: &mut Rng) -> u32 {
        match self {
            Self::Fixed(length) => length,
            Self::Uniform(least, most) => rng.u32(least..=most),
            Self::HeavyTail { least, most, alpha } => {
                let length = f64::from(least) / (1.0 - rng.f64()).powf(1.0 / alpha);
                (length as u32).clamp(least, most)
            }
        }
    }
}

/// A part of the jobs that are alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kind {
    /// Weight among the kinds.
    pub weight: f64,
    /// Prompt tokens.
    pub prompt: Length,
    /// Answer tokens.
    pub answer: Length,
    /// 0 to 9.
    pub priority: u8,
    /// Whether it is of the interactive class: a delta each step, a queue of its own.
    pub interactive: bool,
}

/// Everything that arrives in a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Number of jobs.
    pub jobs: u32,
    /// When they arrive.
    pub arrivals: Arrivals,
    /// What they are like.
    pub kinds: Vec<Kind>,
    /// Relative number of jobs of each tenant.
    pub tenants: Vec<f64>,
    /// So many of the first jobs are the first tenant's and arrive at once, before all others.
    pub flood: u32,
    /// Leading prompt tokens that all jobs of a tenant share.
    pub shared_prefix: u32,
    /// Share of jobs that end by an end-of-text token before their `max_tokens`.
    pub stop_share: f64,
    /// Share of jobs that are cancelled at some time.
    pub cancel_share: f64,
    /// Share of jobs with a deadline, and the most seconds that it leaves.
    pub deadline: (f64, f64),
}

/// One job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSpec {
    /// Prompt tokens.
    pub prompt: u32,
    /// Tokens of the whole answer.
    pub answer: u32,
    /// Most answer tokens asked for.
    pub max_tokens: u32,
    /// Whether the answer ends by an end-of-text token as its last one.
    pub stops: bool,
    /// 0 to 9.
    pub priority: u8,
    /// Interactive class.
    pub interactive: bool,
    /// Whose.
    pub tenant: u32,
    /// Leading prompt tokens shared with the tenant's other jobs.
    pub shared: u32,
    /// Cancelled so long after it was published.
    pub cancel_after: Option<Duration>,
    /// Useful only so long after it was published.
    pub deadline: Option<Duration>,
}

fn pick(weights: impl Iterator<Item = f64> + Clone, rng: &mut Rng) -> usize {
    let mut left = rng.f64() * weights.clone().sum::<f64>();
    let mut last = 0;
    for (index, weight) in weights.enumerate() {
        last = index;
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last
}

impl Workload {
    /// Job number `index` of a run.
    pub fn job(&self, seed: u64, index: u32) -> JobSpec {
        let mut rng = Rng::with_seed(seed ^ (u64::from(index) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let kind = &self.kinds[pick(self.kinds.iter().map(|kind| kind.weight), &mut rng)];
        let prompt = kind.prompt.draw(&mut rng).max(1);
        let answer = kind.answer.draw(&mut rng).max(1);
        let stops = rng.f64() < self.stop_share;
        let cancelled = rng.f64() < self.cancel_share;
        let hurried = rng.f64() < self.deadline.0;
        JobSpec {
            prompt,
            answer,
            max_tokens: if stops { answer + rng.u32(1..=answer.max(2)) } else { answer },
            stops,
            priority: kind.priority,
            interactive: kind.interactive,
            tenant: if index < self.flood { 0 } else { pick(self.tenants.iter().copied(), &mut rng) as u32 },
            shared: self.shared_prefix.min(prompt),
            cancel_after: cancelled.then(|| Duration::from_secs_f64(rng.f64() * rng.f64() * 20.0)),
            deadline: hurried.then(|| Duration::from_secs_f64(0.05 + rng.f64() * self.deadline.1)),
        }
    }

    /// Moments of arrival, in order.
    pub fn clock(&self, seed: u64) -> ArrivalClock {
        ArrivalClock {
            arrivals: self.arrivals,
            flood: self.flood,
            rng: Rng::with_seed(seed ^ 0xA11),
            now: 0.0,
            in_burst: 0,
        }
    }
}

/// Draws the moments of arrival one by one.
#[derive(Debug)]
pub struct ArrivalClock {
    arrivals: Arrivals,
    flood: u32,
    rng: Rng,
    now: f64,
    in_burst: u32,
}

impl ArrivalClock {
    fn wait(&mut self, per_sec: f64) {
        self.now += -(1.0 - self.rng.f64()).ln() / per_sec;
    }

    /// When the next job arrives.
    pub fn tick(&mut self) -> Duration {
        if self.flood > 0 {
            self.flood -= 1;
            return Duration::ZERO;
        }
        match self.arrivals {
            Arrivals::AtOnce => {}
            Arrivals::Poisson { per_sec } => self.wait(per_sec),
            Arrivals::Bursty { per_sec, burst } => {
                if self.in_burst == 0 {
                    self.wait(per_sec / burst);
                    // Geometric, so that bursts differ.
                    let more = (1.0 - self.rng.f64()).ln() / (1.0 - 1.0 / burst.max(1.001)).ln();
                    self.in_burst = more as u32 + 1;
                }
                self.in_burst -= 1;
            }
            Arrivals::Diurnal { per_sec, period_secs } => loop {
                // Thinning of a process at the highest rate.
                self.wait(per_sec * 1.9);
                let rate = 1.0 + 0.9 * (self.now / period_secs * TAU).sin();
                if self.rng.f64() * 1.9 < rate {
                    break;
                }
            },
        }
        Duration::from_secs_f64(self.now)
    }
}
