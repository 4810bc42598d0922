//! What the simulator shows of the policy, at sizes for CI; the long runs are stored under `tests/bench/results`. A failure
//! prints the scenario and seed that repeat it alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.
#![allow(clippy::disallowed_methods)] // The day gives fresh seeds; a failure prints its own.

use std::time::Duration;

use millrace_tests::sim::{Report, Scenario, Setup, run};

fn ended(setup: &Setup) -> Report {
    run(setup).unwrap_or_else(|violation| panic!("{violation}"))
}

fn setup(scenario: Scenario, seed: u64) -> Setup {
    scenario.setup(seed).unwrap()
}

/// A seed of the day, so that other cases are seen than those of yesterday; it stands in every failure.
fn fresh_seed() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() / 86_400 * 1_000
}

#[test]
fn a_saturated_engine_uses_its_token_budget() {
    for seed in 1..=3 {
        let report = ended(&setup(Scenario::Saturation, seed));
        assert!(report.saturated_steps > 500, "{}", report.text());
        assert!(report.budget_used_saturated >= 0.95, "{}", report.text());
        assert!(report.idle_gap <= 0.005, "a device that waits for plans: {}", report.text());
    }
}

#[test]
fn the_budget_is_full_whichever_limit_binds() {
    // Short jobs: sequences run out before tokens do.
    let report = ended(&Setup { waiting: 256, ..setup(Scenario::Linear, 1) });
    assert!(report.full_steps_saturated >= 0.95, "{}", report.text());
    assert!(report.budget_used_saturated < 0.95, "tokens bind here, too: {}", report.text());
}

#[test]
fn long_prompts_do_not_stall_decoding_sequences() {
    for seed in 1..=3 {
        let report = ended(&setup(Scenario::Storm, seed));
        assert!(report.itl_p99_in_steps <= 2.0, "{}", report.text());
        // Every decoding sequence is part of every step: stronger than the percentile.
        assert_eq!(report.gaps_with_a_skipped_step, 0.0, "{}", report.text());
    }
}

#[test]
fn run_ahead_is_what_hides_the_queue() {
    let with = ended(&setup(Scenario::Storm, 4));
    let mut alone = setup(Scenario::Storm, 4);
    alone.limits.run_ahead = 1;
    let without = ended(&alone);
    assert!(with.idle_gap < 0.005 && without.idle_gap > 4.0 * with.idle_gap, "{}{}", with.text(), without.text());
}

#[test]
fn throughput_grows_with_the_number_of_engines() {
    let alone = ended(&Setup { count_bytes: false, ..setup(Scenario::Linear, 1) });
    for engines in [10, 100] {
        let mut many = Setup { count_bytes: false, ..setup(Scenario::Linear, 1) }.with_engines(engines);
        many.workload.jobs = 300 * engines as u32;
        let report = ended(&many);
        let share = report.jobs_per_sec_per_engine / alone.jobs_per_sec_per_engine;
        assert!(share >= 0.9, "{share} of one engine's throughput: {}", report.text());
    }
}

#[test]
fn a_thousand_engines_lose_nothing() {
    let mut many = Setup { count_bytes: false, ..setup(Scenario::Linear, 2) }.with_engines(1_000);
    many.spec.blocks = 256;
    many.workload.jobs = 20_000;
    many.executor_deaths_secs = 0.05;
    many.scheduler_deaths_secs = 0.1;
    let report = ended(&many);
    assert_eq!(report.ends.done, 20_000, "{}", report.text());
    assert!(report.faults.iter().all(|count| *count > 0), "nothing died: {}", report.text());
}

#[test]
fn tenants_share_by_tokens_and_not_by_jobs() {
    let report = ended(&setup(Scenario::Fairness, 1));
    assert!(report.fairness >= 0.95, "{}", report.text());
}

#[test]
fn ageing_bounds_the_wait_of_the_lowest_priority() {
    let setup = setup(Scenario::Starvation, 1);
    let report = ended(&setup);
    let waits = report.longest_wait_secs_by_priority;
    // Nine levels up, then as one of those of priority 9 that came before.
    let bound = setup.limits.ageing.as_secs_f64() * 9.0 + waits[9];
    assert!(waits[0] > waits[9], "there was no flood: {}", report.text());
    assert!(waits[0] <= bound, "{} s, {bound} s at most: {}", waits[0], report.text());
    assert_eq!(report.ends.done, setup.workload.jobs);
}

#[test]
fn everything_at_random_keeps_every_invariant() {
    let (mut preemptions, mut faults, mut other_ends) = (0, [0; 3], [0; 3]);
    let fresh = fresh_seed();
    for seed in (1..=150).chain(fresh..fresh + 150) {
        let report = ended(&setup(Scenario::Chaos, seed));
        preemptions += report.preemptions;
        faults.iter_mut().zip(report.faults).for_each(|(sum, count)| *sum += count);
        let ends = [report.ends.cancelled, report.ends.expired, report.ends.refused];
        other_ends.iter_mut().zip(ends).for_each(|(sum, count)| *sum += count);
    }
    let all = faults.iter().copied().chain(other_ends.map(u64::from)).chain([preemptions]);
    assert!(all.clone().all(|count| count > 0), "something never happened: {:?}", all.collect::<Vec<_>>());
}

#[test]
fn a_seed_repeats_its_run() {
    let digest = |seed| ended(&setup(Scenario::Chaos, seed)).digest;
    assert_eq!(digest(11), digest(11));
    assert_ne!(digest(11), digest(12));
}

#[test]
fn a_violation_names_the_seed_that_repeats_it() {
    let hurried = Setup { end_by: Duration::from_secs(1), ..setup(Scenario::Saturation, 77) };
    let violation = run(&hurried).expect_err("3,000 jobs take longer than a second");
    let text = violation.to_string();
    assert!(text.contains("have not ended") && text.contains("saturation --seed 77"), "{text}");
    assert_eq!(run(&hurried).expect_err("again"), violation);
}
