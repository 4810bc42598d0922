//! What comes out of a run: what is measured on the way, and the figures at the end. Times in seconds.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use serde::Serialize;

use super::engine::{Engine, Sums};
use super::histogram::{Histogram, Summary};
use super::jobs::{End, Place, Record};
use super::scenario::Setup;
use super::traffic::{Messages, measured};
use super::workload::JobSpec;

/// Weight of a drawn token in a tenant's share, as in the policy.
const DRAWN_WEIGHT: u64 = 2;

/// What is measured while a run goes on.
#[derive(Debug)]
pub struct Measures {
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
    queue: Histogram,
    longest_wait_by_priority: [f64; 10],
    wait_by_tenant: Vec<(f64, u32)>,
    skipped_steps: u64,
    /// Device time of steps.
    pub step_secs: Histogram,
    /// Sequences that lost their slot.
    pub preemptions: u64,
    /// Offers that a stale beacon led to a full scheduler.
    pub busy_answers: u64,
    /// Jobs delivered again.
    pub redeliveries: u64,
    /// Executors that died.
    pub executor_deaths: u64,
    /// Schedulers that died.
    pub scheduler_deaths: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    served: Vec<u64>,
    unfinished: Vec<u32>,
    /// Shares at the moment when the first tenant had no work left: until then all of them competed.
    served_in_competition: Option<Vec<u64>>,
}

impl Measures {
    /// Nothing measured yet.
    pub fn new(setup: &Setup) -> Self {
        let tenants = setup.workload.tenants.len();
        let mut unfinished = vec![0; tenants];
        for job in 0..setup.workload.jobs {
            unfinished[setup.workload.job(setup.seed, job).tenant as usize] += 1;
        }
        Self {
            ttft: Histogram::default(),
            itl: Histogram::default(),
            e2e: Histogram::default(),
            queue: Histogram::default(),
            longest_wait_by_priority: [0.0; 10],
            wait_by_tenant: vec![(0.0, 0); tenants],
            skipped_steps: 0,
            step_secs: Histogram::default(),
            preemptions: 0,
            busy_answers: 0,
            redeliveries: 0,
            executor_deaths: 0,
            scheduler_deaths: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            served: vec![0; tenants],
            unfinished,
            served_in_competition: None,
        }
    }

    /// A job got a slot.
    pub fn admitted(&mut self, record: &mut Record, spec: &JobSpec, cached: usize, again: bool, now: Duration) {
        if again || record.admitted.is_some() {
            return;
        }
        record.admitted = Some(now);
        let wait = (now - record.published).as_secs_f64();
        self.queue.add(wait);
        let longest = &mut self.longest_wait_by_priority[usize::from(spec.priority.min(9))];
        *longest = longest.max(wait);
        let tenant = &mut self.wait_by_tenant[spec.tenant as usize];
        (tenant.0, tenant.1) = (tenant.0 + wait, tenant.1 + 1);
        self.prompt_tokens += u64::from(spec.prompt);
        self.cached_tokens += cached as u64;
        self.served[spec.tenant as usize] += u64::from(spec.prompt) - (cached as u64).min(u64::from(spec.prompt));
    }

    /// A token came; `before`: when the one before did.
    pub fn token(&mut self, record: &Record, before: Option<(Duration, u64)>, spec: &JobSpec, now: Duration) {
        self.served[spec.tenant as usize] += DRAWN_WEIGHT;
        match before {
            None => self.ttft.add((now - record.published).as_secs_f64()),
            Some((before, step)) => {
                self.itl.add((now - before).as_secs_f64());
                // Behind a change of engines the counts say nothing.
                self.skipped_steps += u64::from(record.attempts == 1 && record.last_step > step + 1);
            }
        }
    }

    /// A job ended.
    pub fn ended(&mut self, record: &Record, spec: &JobSpec, now: Duration) {
        if record.place == Place::Ended(End::Done) {
            self.e2e.add((now - record.published).as_secs_f64());
        }
        let left = &mut self.unfinished[spec.tenant as usize];
        *left -= 1;
        if *left == 0 && self.served_in_competition.is_none() {
            self.served_in_competition = Some(self.served.clone());
        }
    }
}

/// How evenly something is shared: 1 if all have the same, 1/n if one has all (Jain et al. 1984).
pub fn jain(shares: &[u64]) -> f64 {
    let sum: f64 = shares.iter().map(|share| *share as f64).sum();
    let squares: f64 = shares.iter().map(|share| (*share as f64).powi(2)).sum();
    if squares == 0.0 { 1.0 } else { sum * sum / (shares.len() as f64 * squares) }
}

/// Ends by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Ends {
    /// With the whole answer.
    pub done: u32,
    /// By the publisher's wish.
    pub cancelled: u32,
    /// By their deadline.
    pub expired: u32,
    /// Too large for the engine.
    pub refused: u32,
    /// Suspected of bringing engines down.
    pub poison: u32,
}

/// A run in figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Which settings.
    pub scenario: String,
    /// Repeats the run.
    pub seed: u64,
    /// Engines.
    pub engines: usize,
    /// Jobs.
    pub jobs: u32,
    /// How they ended.
    pub ends: Ends,
    /// Virtual seconds from the first event to the last end.
    pub virtual_secs: f64,
    /// Jobs ended per second and engine, while a fifth to four fifths of them ended.
    pub jobs_per_sec_per_engine: f64,
    /// Tokens drawn per second, all engines.
    pub out_tokens_per_sec: f64,
    /// From publishing to the first token.
    pub ttft_secs: Summary,
    /// Between two tokens of a job.
    pub itl_secs: Summary,
    /// From publishing to the end, jobs done.
    pub e2e_secs: Summary,
    /// From publishing to the first slot.
    pub queue_secs: Summary,
    /// Longest such wait by priority 0 to 9.
    pub longest_wait_secs_by_priority: [f64; 10],
    /// Mean such wait by tenant.
    pub mean_wait_secs_by_tenant: Vec<f64>,
    /// Device time of steps.
    pub step_secs: Summary,
    /// 99th percentile of the gaps between tokens over the median step.
    pub itl_p99_in_steps: f64,
    /// Share of the gaps in which the engine ran a step without the sequence.
    pub gaps_with_a_skipped_step: f64,
    /// Steps.
    pub steps: u64,
    /// Share of the token budget that is used while something waits.
    pub budget_used_saturated: f64,
    /// Share of the sequences allowed that run while something waits.
    pub sequences_used_saturated: f64,
    /// Share of the saturated steps in which all tokens or all sequences are in use.
    pub full_steps_saturated: f64,
    /// Steps behind which something waited.
    pub saturated_steps: u64,
    /// Share of the token budget used in all steps.
    pub budget_used: f64,
    /// Time devices computed over the time they could have (from start to end).
    pub device_busy: f64,
    /// Time devices waited for a plan although something ran, over the time they computed.
    pub idle_gap: f64,
    /// Jain's index over tenants' weighted tokens until the first of them had no work left.
    pub fairness: f64,
    /// Sequences that lost their slot.
    pub preemptions: u64,
    /// Prompt tokens found in prefix caches, over all.
    pub cached_share: f64,
    /// Mean bytes of a plan.
    pub plan_bytes: f64,
    /// Mean bytes for each sequence of plans that open none.
    pub plan_bytes_per_sequence: f64,
    /// NATS messages by kind.
    pub messages: Messages,
    /// The same per second, as one server would see them.
    pub messages_per_sec: f64,
    /// Stored messages among them, per second.
    pub stored_per_sec: f64,
    /// Servers needed for this at the measured rates: (all messages, fenced appends, appends with fsync each).
    pub nats_servers_needed: [f64; 3],
    /// Offers to a full scheduler.
    pub busy_answers: u64,
    /// Jobs delivered again, executors and schedulers that died.
    pub faults: [u64; 3],
    /// Same run, same digest.
    pub digest: String,
}

impl Report {
    /// Figures of a run that has ended.
    pub fn of(
        setup: &Setup,
        measures: &Measures,
        records: &[Record],
        engines: &[Engine],
        mut messages: Messages,
        now: Duration,
    ) -> Self {
        let mut all = Sums::default();
        for sums in engines.iter().map(|engine| &engine.sums) {
            all.steps += sums.steps;
            all.tokens += sums.tokens;
            all.decodes += sums.decodes;
            all.saturated_steps += sums.saturated_steps;
            all.saturated_tokens += sums.saturated_tokens;
            all.saturated_running += sums.saturated_running;
            all.full_steps += sums.full_steps;
            all.busy_secs += sums.busy_secs;
            all.idle_secs += sums.idle_secs;
            all.plan_bytes += sums.plan_bytes;
            all.work_bytes += sums.work_bytes;
            all.work_entries += sums.work_entries;
        }
        let secs = now.as_secs_f64().max(1e-9);
        // Beacons that nothing changed for: four a second from each scheduler and executor.
        messages.beacons += (secs * 4.0 * 2.0 * engines.len() as f64) as u64;
        let budget = setup.limits.step_tokens.min(setup.spec.step_tokens as usize) as f64;
        let most_running = engines.first().map_or(0, |engine| engine.planner.counts().max_running) as f64;
        let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let drawn: u64 = records.iter().map(|record| u64::from(record.tokens)).sum();
        let stored = messages.stored() as f64 / secs;
        let step_secs = measures.step_secs.summary();
        let itl_secs = measures.itl.summary();
        Self {
            scenario: setup.name.clone(),
            seed: setup.seed,
            engines: setup.engines,
            jobs: setup.workload.jobs,
            ends: ends(records),
            virtual_secs: secs,
            jobs_per_sec_per_engine: steady_rate(records) / setup.engines as f64,
            out_tokens_per_sec: drawn as f64 / secs,
            ttft_secs: measures.ttft.summary(),
            itl_secs,
            e2e_secs: measures.e2e.summary(),
            queue_secs: measures.queue.summary(),
            longest_wait_secs_by_priority: measures.longest_wait_by_priority,
            mean_wait_secs_by_tenant: measures
                .wait_by_tenant
                .iter()
                .map(|(sum, count)| ratio(*sum, f64::from(*count)))
                .collect(),
            step_secs,
            itl_p99_in_steps: ratio(itl_secs.p99, step_secs.p50),
            gaps_with_a_skipped_step: ratio(measures.skipped_steps as f64, itl_secs.count as f64),
            steps: all.steps,
            budget_used_saturated: ratio(all.saturated_tokens as f64, all.saturated_steps as f64 * budget),
            sequences_used_saturated: ratio(all.saturated_running as f64, all.saturated_steps as f64 * most_running),
            full_steps_saturated: ratio(all.full_steps as f64, all.saturated_steps as f64),
            saturated_steps: all.saturated_steps,
            budget_used: ratio(all.tokens as f64, all.steps as f64 * budget),
            device_busy: ratio(all.busy_secs, secs * engines.len() as f64),
            idle_gap: ratio(all.idle_secs, all.busy_secs),
            fairness: jain(measures.served_in_competition.as_deref().unwrap_or(&measures.served)),
            preemptions: measures.preemptions,
            cached_share: ratio(measures.cached_tokens as f64, measures.prompt_tokens as f64),
            plan_bytes: ratio(all.plan_bytes as f64, all.steps as f64),
            plan_bytes_per_sequence: ratio(all.work_bytes as f64, all.work_entries as f64),
            messages,
            messages_per_sec: messages.all() as f64 / secs,
            stored_per_sec: stored,
            nats_servers_needed: [
                messages.all() as f64 / secs / measured::CORE_PER_SEC,
                stored / measured::FENCED_PER_SEC,
                stored / measured::FENCED_SYNC_PER_SEC,
            ],
            busy_answers: measures.busy_answers,
            faults: [measures.redeliveries, measures.executor_deaths, measures.scheduler_deaths],
            digest: digest(records),
        }
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let row = |name: &str, s: &Summary| {
            let ms = |secs: f64| format!("{:>11.2}", secs * 1e3);
            format!("  {name:<6}{}{}{}{}{}\n", ms(s.mean), ms(s.p50), ms(s.p90), ms(s.p99), ms(s.max))
        };
        let mut text = format!(
            "{} seed {}: {} jobs on {} engines in {:.1} virtual s ({} done, {} cancelled, {} expired, {} refused, {} poison)\n",
            self.scenario,
            self.seed,
            self.jobs,
            self.engines,
            self.virtual_secs,
            self.ends.done,
            self.ends.cancelled,
            self.ends.expired,
            self.ends.refused,
            self.ends.poison
        );
        text += &format!("  ms    {:>11}{:>11}{:>11}{:>11}{:>11}\n", "mean", "p50", "p90", "p99", "max");
        let rows = [("queue", &self.queue_secs), ("TTFT", &self.ttft_secs), ("ITL", &self.itl_secs)];
        for (name, summary) in rows.into_iter().chain([("e2e", &self.e2e_secs), ("step", &self.step_secs)]) {
            text += &row(name, summary);
        }
        text += &format!(
            "  ITL p99 = {:.2} median steps, {:.4} % of gaps skip a step; while saturated ({} of {} steps) {:.2} % of tokens and {:.2} % of sequences are used, {:.2} % of steps are full; device busy {:.2} %, idle gap {:.3} %\n",
            self.itl_p99_in_steps,
            self.gaps_with_a_skipped_step * 100.0,
            self.saturated_steps,
            self.steps,
            self.budget_used_saturated * 100.0,
            self.sequences_used_saturated * 100.0,
            self.full_steps_saturated * 100.0,
            self.device_busy * 100.0,
            self.idle_gap * 100.0
        );
        text += &format!(
            "  {:.2} jobs/s per engine, {:.0} tokens/s; fairness {:.4}; {} preemptions; {:.1} % of prompts cached; {} busy answers; faults {:?}\n",
            self.jobs_per_sec_per_engine,
            self.out_tokens_per_sec,
            self.fairness,
            self.preemptions,
            self.cached_share * 100.0,
            self.busy_answers,
            self.faults
        );
        text += &format!(
            "  plan {:.0} B, {:.1} B per sequence; {:.0} messages/s, {:.0} stored/s; servers needed {:.3} core, {:.3} fenced, {:.2} fsync\n",
            self.plan_bytes,
            self.plan_bytes_per_sequence,
            self.messages_per_sec,
            self.stored_per_sec,
            self.nats_servers_needed[0],
            self.nats_servers_needed[1],
            self.nats_servers_needed[2]
        );
        text + &format!("  digest {}\n", self.digest)
    }
}

fn ends(records: &[Record]) -> Ends {
    let count = |end| records.iter().filter(|record| record.place == Place::Ended(end)).count() as u32;
    Ends {
        done: count(End::Done),
        cancelled: count(End::Cancelled),
        expired: count(End::Expired),
        refused: count(End::Refused),
        poison: count(End::Poison),
    }
}

/// Jobs per second between the moments when a fifth and four fifths of them had ended.
fn steady_rate(records: &[Record]) -> f64 {
    let mut ended: Vec<Duration> = records.iter().map(|record| record.ended).collect();
    ended.sort_unstable();
    let (from, to) = (ended.len() / 5, ended.len() * 4 / 5);
    match ended.get(from..=to) {
        Some([first, .., last]) if last > first => (to - from) as f64 / (*last - *first).as_secs_f64(),
        _ => 0.0,
    }
}

fn digest(records: &[Record]) -> String {
    let mut hasher = DefaultHasher::new();
    for record in records {
        (record.published, record.first_token, record.last_token, record.ended, record.tokens).hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}
