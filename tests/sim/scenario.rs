//! What is simulated: everything a run depends on, and the named settings that tests and the program share.

use std::time::Duration;

use anyhow::{Result, bail};
use fastrand::Rng;
use millrace_protocol::engine::EngineSpec;
use millrace_scheduler::policy::Limits;

use super::cost::CostModel;
use super::engine::h200_spec;
use super::workload::{Arrivals, Kind, Length, Workload};

/// Everything that decides a run.
#[derive(Debug, Clone)]
pub struct Setup {
    /// How a failure names it.
    pub name: String,
    /// All randomness.
    pub seed: u64,
    /// Scheduler and executor pairs.
    pub engines: usize,
    /// What each executor offers.
    pub spec: EngineSpec,
    /// What each scheduler may do.
    pub limits: Limits,
    /// Jobs a scheduler accepts beyond those that run.
    pub waiting: usize,
    /// Time of a step.
    pub cost: CostModel,
    /// Preprocess actors, and jobs that each of them has in hand: interactive ones, others.
    pub preprocess: (usize, usize, usize),
    /// Whether an actor takes the roomier of two schedulers drawn by lot instead of the roomiest of all.
    pub two_choices: bool,
    /// What arrives.
    pub workload: Workload,
    /// Mean seconds between the deaths of executors, over all engines; 0: none dies.
    pub executor_deaths_secs: f64,
    /// The same for scheduler processes.
    pub scheduler_deaths_secs: f64,
    /// Silence after which the queue delivers a job again.
    pub ack_wait: Duration,
    /// Least time between two deltas outside the interactive class.
    pub coalesce: Duration,
    /// Every so many steps the policy proves all of its books; the executor's ledger is compared in every step.
    pub full_check_every: u64,
    /// Whether plans are encoded (every sixteenth) to count their bytes.
    pub count_bytes: bool,
    /// Virtual time by which everything must have ended.
    pub end_by: Duration,
}

/// Named settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// More prompts than one engine can compute: how full are its steps.
    Saturation,
    /// Decoding sequences while prompts of 32k tokens arrive.
    Storm,
    /// Saturated engines with short jobs: how throughput grows with their number.
    Linear,
    /// Tenants with short and with long jobs compete.
    Fairness,
    /// One tenant publishes thousands of jobs at once, others a few afterwards.
    Flood,
    /// Low priorities under a flood of the highest.
    Starvation,
    /// Mixed lengths and classes at four fifths of capacity.
    Mixed,
    /// Everything at random, faults included; small pools.
    Chaos,
}

impl Scenario {
    /// All of them, by name.
    pub const ALL: [(&str, Self); 8] = [
        ("saturation", Self::Saturation),
        ("storm", Self::Storm),
        ("linear", Self::Linear),
        ("fairness", Self::Fairness),
        ("flood", Self::Flood),
        ("starvation", Self::Starvation),
        ("mixed", Self::Mixed),
        ("chaos", Self::Chaos),
    ];

    /// The one of that name.
    ///
    /// # Errors
    /// Lists the names there are.
    pub fn named(name: &str) -> Result<Self> {
        match Self::ALL.iter().find(|(known, _)| *known == name) {
            Some((_, scenario)) => Ok(*scenario),
            None => bail!("no scenario {name:?}; there are: {}", Self::ALL.map(|(known, _)| known).join(", ")),
        }
    }

    /// Its settings.
    ///
    /// # Errors
    /// None in practice: names in it are constants.
    pub fn setup(self, seed: u64) -> Result<Setup> {
        let mut setup = base(self, seed)?;
        let load = &mut setup.workload;
        match self {
            Self::Saturation => {
                load.jobs = 3_000;
                load.kinds = vec![kind(1.0, Length::Uniform(256, 1_024), Length::Uniform(8, 96), 5, false)];
            }
            Self::Storm => {
                load.jobs = 400;
                load.arrivals = Arrivals::Bursty { per_sec: 40.0, burst: 8.0 };
                load.kinds = vec![
                    kind(0.8, Length::Uniform(32, 256), Length::Uniform(256, 1_024), 5, true),
                    kind(0.2, Length::Fixed(32_768), Length::Fixed(16), 5, true),
                ];
            }
            Self::Linear => {
                load.jobs = 1_000;
                load.kinds = vec![kind(1.0, Length::Uniform(32, 256), Length::Uniform(16, 64), 5, false)];
                setup.spec = h200_spec(4_096, 256, 2_048)?;
            }
            Self::Fairness => {
                load.jobs = 6_000;
                load.tenants = vec![1.0; 8];
                load.kinds = vec![
                    kind(1.0, Length::Uniform(64, 128), Length::Uniform(8, 32), 5, false),
                    kind(1.0, Length::Uniform(256, 768), Length::Uniform(64, 192), 5, false),
                ];
                setup.waiting = 512;
            }
            Self::Flood => {
                load.jobs = 4_000;
                load.flood = 3_000;
                load.arrivals = Arrivals::Poisson { per_sec: 40.0 };
                load.tenants = vec![0.0, 1.0, 1.0, 1.0];
                load.kinds = vec![kind(1.0, Length::Uniform(256, 1_024), Length::Uniform(8, 96), 5, false)];
            }
            Self::Starvation => {
                load.jobs = 6_000;
                load.arrivals = Arrivals::Poisson { per_sec: 75.0 };
                load.kinds = vec![
                    kind(0.99, Length::Uniform(512, 1_024), Length::Uniform(32, 128), 9, false),
                    kind(0.01, Length::Uniform(512, 1_024), Length::Uniform(32, 128), 0, false),
                ];
                setup.limits.ageing = Duration::from_secs(2);
            }
            Self::Mixed => {
                load.jobs = 2_000;
                load.arrivals = Arrivals::Poisson { per_sec: 30.0 };
                load.tenants = (1..=10).map(|rank| 1.0 / f64::from(rank)).collect();
                load.shared_prefix = 96;
                load.stop_share = 0.5;
                let tail = |least, most| Length::HeavyTail { least, most, alpha: 1.3 };
                load.kinds = vec![
                    kind(0.5, tail(64, 16_384), tail(16, 2_048), 5, true),
                    kind(0.1, tail(32, 4_096), tail(8, 512), 9, true),
                    kind(0.4, tail(128, 30_000), tail(32, 2_048), 2, false),
                ];
            }
            Self::Chaos => chaos(&mut setup)?,
        }
        Ok(setup)
    }
}

impl Setup {
    /// The same with so many engines, and as many preprocess actors as keep up with their offers.
    pub fn with_engines(mut self, engines: usize) -> Self {
        self.engines = engines;
        self.preprocess.0 = self.preprocess.0.max(engines / 8);
        self
    }
}

fn base(scenario: Scenario, seed: u64) -> Result<Setup> {
    let name = Scenario::ALL.iter().find(|(_, other)| *other == scenario).map_or("", |(name, _)| name);
    Ok(Setup {
        name: name.to_owned(),
        seed,
        engines: 1,
        // 115 GB of keys and values behind Qwen3-4B's weights on an H200.
        spec: h200_spec(48_000, 256, 2_048)?,
        limits: Limits { max_running: 256, step_tokens: 2_048, ..Limits::default() },
        waiting: 64,
        cost: CostModel::H200_QWEN3_4B,
        preprocess: (2, 32, 16),
        two_choices: false,
        workload: Workload {
            jobs: 1_000,
            arrivals: Arrivals::AtOnce,
            kinds: vec![],
            tenants: vec![1.0],
            flood: 0,
            shared_prefix: 0,
            stop_share: 0.0,
            cancel_share: 0.0,
            deadline: (0.0, 0.0),
        },
        executor_deaths_secs: 0.0,
        scheduler_deaths_secs: 0.0,
        ack_wait: Duration::from_secs(10),
        coalesce: Duration::from_millis(200),
        full_check_every: 256,
        count_bytes: true,
        end_by: Duration::from_secs(1_000_000),
    })
}

fn kind(weight: f64, prompt: Length, answer: Length, priority: u8, interactive: bool) -> Kind {
    Kind { weight, prompt, answer, priority, interactive }
}

/// Everything follows from the seed. Pools are small, so that sequences are preempted, and lengths are, so that it is fast.
fn chaos(setup: &mut Setup) -> Result<()> {
    let mut rng = Rng::with_seed(setup.seed ^ 0xC4A05);
    let slots = rng.u32(1..24);
    let step_tokens = rng.u32(8..256);
    setup.engines = rng.usize(1..6);
    setup.spec = h200_spec(rng.u32(40..200), slots, rng.u32(8..300))?;
    setup.limits = Limits {
        max_running: rng.usize(1..32),
        step_tokens: step_tokens as usize,
        step_patches: 1_000,
        watermark_blocks: rng.usize(0..6),
        ageing: Duration::from_millis(rng.u64(0..3_000)),
        prefix_cache: rng.bool(),
        run_ahead: rng.usize(1..4),
        ..Limits::default()
    };
    setup.waiting = rng.usize(0..40);
    setup.preprocess = (rng.usize(1..4), rng.usize(1..20), rng.usize(1..20));
    setup.ack_wait = Duration::from_millis(rng.u64(500..5_000));
    setup.executor_deaths_secs = if rng.bool() { 0.0 } else { rng.f64() * 8.0 + 2.0 };
    setup.scheduler_deaths_secs = if rng.bool() { 0.0 } else { rng.f64() * 15.0 + 5.0 };
    setup.full_check_every = 1;
    let per_sec = 2.0 + 60.0 * rng.f64();
    let arrivals = [
        Arrivals::AtOnce,
        Arrivals::Poisson { per_sec },
        Arrivals::Bursty { per_sec, burst: 1.5 + 20.0 * rng.f64() },
        Arrivals::Diurnal { per_sec, period_secs: 2.0 + 10.0 * rng.f64() },
    ];
    let tail = |rng: &mut Rng, most| Length::HeavyTail { least: rng.u32(1..40), most, alpha: 0.8 + rng.f64() };
    let kinds = (0..rng.usize(1..5)).map(|_| Kind {
        weight: 0.1 + rng.f64(),
        prompt: tail(&mut rng, 600),
        answer: tail(&mut rng, 200),
        priority: rng.u8(0..10),
        interactive: rng.bool(),
    });
    let kinds = kinds.collect();
    setup.workload = Workload {
        jobs: rng.u32(20..200),
        arrivals: arrivals[rng.usize(0..arrivals.len())],
        kinds,
        tenants: (0..rng.usize(1..6)).map(|_| 0.1 + rng.f64()).collect(),
        flood: 0,
        shared_prefix: rng.u32(0..80),
        stop_share: rng.f64(),
        cancel_share: if rng.bool() { 0.0 } else { 0.3 * rng.f64() },
        deadline: (if rng.bool() { 0.0 } else { 0.3 * rng.f64() }, 0.2 + 10.0 * rng.f64()),
    };
    setup.end_by = Duration::from_secs(100_000);
    Ok(())
}
