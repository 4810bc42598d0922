//! `millrace-sim`: runs a scenario of the simulator and prints what came out.
//!
//!     cargo run -p millrace-tests --bin millrace-sim -- storm --seed 7
//!     cargo run --release -p millrace-tests --bin millrace-sim -- linear --engines 1000 --jobs 1000000 --json
#![allow(clippy::print_stdout, clippy::disallowed_methods)] // A program for people; it measures its own speed.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Parser;
use millrace_tests::sim::workload::Arrivals;
use millrace_tests::sim::{Scenario, run};

/// Simulates schedulers, executors and NATS on virtual time. The policy is the real one; a step takes what a cost model
/// fitted to an H200 says. Exits with 1 and the seed if an invariant does not hold.
#[derive(Debug, Parser)]
struct Args {
    /// saturation, storm, linear, fairness, flood, starvation, mixed or chaos.
    scenario: String,
    /// Decides everything random: the same seed gives the same run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs this many seeds, one after another, and stops at the first that fails.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Scheduler and executor pairs.
    #[arg(long)]
    engines: Option<usize>,
    /// Jobs.
    #[arg(long)]
    jobs: Option<u32>,
    /// at-once, poisson, bursty or diurnal.
    #[arg(long)]
    arrivals: Option<String>,
    /// Mean jobs per second over all engines, for the arrivals that have a rate.
    #[arg(long, default_value_t = 30.0)]
    per_sec: f64,
    /// Jobs a scheduler accepts beyond those that run.
    #[arg(long)]
    waiting: Option<usize>,
    /// Most tokens of a step.
    #[arg(long)]
    step_tokens: Option<usize>,
    /// Most sequences of an engine.
    #[arg(long)]
    max_sequences: Option<usize>,
    /// Plans sent ahead.
    #[arg(long)]
    run_ahead: Option<usize>,
    /// Offers go to the roomier of two schedulers drawn by lot, not to the roomiest of all.
    #[arg(long)]
    two_choices: bool,
    /// Mean seconds between deaths of executors.
    #[arg(long)]
    executor_deaths_secs: Option<f64>,
    /// Mean seconds between deaths of schedulers.
    #[arg(long)]
    scheduler_deaths_secs: Option<f64>,
    /// One JSON document for each run instead of text.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    for seed in args.seed..args.seed + args.seeds {
        let mut setup = Scenario::named(&args.scenario)?.setup(seed)?;
        if let Some(engines) = args.engines {
            setup = setup.with_engines(engines);
        }
        let rate = args.per_sec;
        match args.arrivals.as_deref() {
            None => {}
            Some("at-once") => setup.workload.arrivals = Arrivals::AtOnce,
            Some("poisson") => setup.workload.arrivals = Arrivals::Poisson { per_sec: rate },
            Some("bursty") => setup.workload.arrivals = Arrivals::Bursty { per_sec: rate, burst: 20.0 },
            Some("diurnal") => setup.workload.arrivals = Arrivals::Diurnal { per_sec: rate, period_secs: 60.0 },
            Some(other) => bail!("no arrivals {other:?}; there are: at-once, poisson, bursty, diurnal"),
        }
        setup.two_choices = args.two_choices;
        setup.workload.jobs = args.jobs.unwrap_or(setup.workload.jobs);
        setup.waiting = args.waiting.unwrap_or(setup.waiting);
        setup.limits.run_ahead = args.run_ahead.unwrap_or(setup.limits.run_ahead);
        setup.executor_deaths_secs = args.executor_deaths_secs.unwrap_or(setup.executor_deaths_secs);
        setup.scheduler_deaths_secs = args.scheduler_deaths_secs.unwrap_or(setup.scheduler_deaths_secs);
        if let Some(tokens) = args.step_tokens {
            setup.limits.step_tokens = tokens;
            setup.spec.step_tokens = tokens as u32;
        }
        if let Some(sequences) = args.max_sequences {
            setup.limits.max_running = sequences;
            setup.spec.slots = sequences as u32;
        }
        let start = Instant::now();
        let report = run(&setup)?;
        let wall = start.elapsed().as_secs_f64();
        if args.json {
            let mut document = serde_json::to_value(&report)?;
            document["wall_secs"] = wall.into();
            document["build"] = if cfg!(debug_assertions) { "dev" } else { "release" }.into();
            println!("{}", serde_json::to_string_pretty(&document)?);
        } else {
            println!("{}  {wall:.2} s of real time", report.text());
        }
    }
    Ok(())
}
