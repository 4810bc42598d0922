//! One scheduler with its executor: the real policy, the executor's books, and a device that computes plans in their order.
//! Must not know jobs' records or other engines.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use fastrand::Rng;
use millrace_protocol::ActorId;
use millrace_protocol::engine::EngineSpec;
use millrace_protocol::plan::StepPlan;
use millrace_protocol::step::SlotToken;
use millrace_scheduler::policy::{Blame, Events, NewSequence, Planner, SeqId};

use super::ledger::Ledger;
use super::scenario::Setup;
use super::traffic::Network;

/// A plan that is out.
#[derive(Debug)]
pub struct Out {
    drawn: Vec<SlotToken>,
    busy: Duration,
    /// When its output reaches the scheduler.
    pub back_at: Duration,
}

/// Sums over an engine's steps.
#[derive(Debug, Clone, Default)]
pub struct Sums {
    /// Steps planned.
    pub steps: u64,
    /// Tokens computed.
    pub tokens: u64,
    /// Decoded tokens among them.
    pub decodes: u64,
    /// Steps behind which something still waited: nothing but the policy kept them from being full.
    pub saturated_steps: u64,
    /// Tokens of those.
    pub saturated_tokens: u64,
    /// Sequences running in those.
    pub saturated_running: u64,
    /// Those among them with every token or every sequence of the limits in use.
    pub full_steps: u64,
    /// Time the device computed, in seconds.
    pub busy_secs: f64,
    /// Time the device waited between two steps that were both planned while something ran, in seconds.
    pub idle_secs: f64,
    /// Bytes of plans, opened sequences included.
    pub plan_bytes: u64,
    /// Bytes of plans without opened sequences.
    pub work_bytes: u64,
    /// Sequences that decode, over all steps whose bytes are in `work_bytes`.
    pub work_entries: u64,
}

/// Scheduler and executor.
pub struct Engine {
    /// The real policy.
    pub planner: Planner,
    /// Jobs accepted and not ended.
    pub held: usize,
    /// Whose sequence it is.
    pub by_seq: HashMap<SeqId, u32>,
    /// Counts lost executors and schedulers: what belongs to an earlier one is void.
    pub incarnation: u32,
    /// Whether an executor is attached.
    pub attached: bool,
    /// Whether a beacon is on its way.
    pub beacon_scheduled: bool,
    /// Outputs taken so far.
    pub outputs: u64,
    /// Sums for the report.
    pub sums: Sums,
    dead: bool,
    ledger: Ledger,
    out: VecDeque<Out>,
    plan_arrives: Duration,
    device_free: Duration,
    step: u64,
}

impl Engine {
    /// An engine with its executor attached.
    pub fn new(setup: &Setup, now: Duration) -> Self {
        let mut engine = Self {
            planner: Planner::new(setup.limits.clone()),
            held: 0,
            by_seq: HashMap::new(),
            incarnation: 0,
            attached: false,
            beacon_scheduled: false,
            outputs: 0,
            sums: Sums::default(),
            dead: false,
            ledger: ledger(setup),
            out: VecDeque::new(),
            plan_arrives: Duration::ZERO,
            device_free: Duration::ZERO,
            step: 0,
        };
        engine.attach(setup, now, &mut Events::new());
        engine
    }

    /// A fresh executor.
    pub fn attach(&mut self, setup: &Setup, now: Duration, events: &mut Events) {
        self.planner.attach(&setup.spec, now, events);
        self.ledger = ledger(setup);
        (self.attached, self.dead) = (true, false);
        (self.device_free, self.plan_arrives) = (now, now);
    }

    /// The executor is silent for good.
    pub fn detach(&mut self, now: Duration, events: &mut Events) {
        self.planner.detach(Blame::Engine, now, events);
        self.attached = false;
    }

    /// The executor dies, unnoticed so far: nothing that is out or will be sent comes back.
    pub fn die(&mut self) {
        self.incarnation += 1;
        self.dead = true;
        self.out.clear();
    }

    /// The scheduler's process died: all it knew is gone.
    pub fn forget(&mut self, setup: &Setup) {
        self.die();
        self.planner = Planner::new(setup.limits.clone());
        self.by_seq.clear();
        (self.held, self.attached) = (0, false);
    }

    /// Jobs that would be accepted now, as the actor counts them.
    pub fn free_jobs(&self, waiting: usize) -> usize {
        let most = self.planner.counts().max_running;
        if self.attached && most > 0 { (most + waiting).saturating_sub(self.held) } else { 0 }
    }

    /// Takes a job in.
    pub fn submit(&mut self, job: u32, new: NewSequence, now: Duration, events: &mut Events) -> SeqId {
        let seq = self.planner.submit(new, now, events);
        self.by_seq.insert(seq, job);
        seq
    }

    /// Sends as many plans as may be out. Returns when their outputs come back.
    ///
    /// # Errors
    /// What a plan contradicts.
    pub fn pump(
        &mut self,
        setup: &Setup,
        now: Duration,
        rng: &mut Rng,
        events: &mut Events,
        ends_at: impl Fn(&str) -> (u32, Option<usize>),
    ) -> Result<Vec<Duration>, String> {
        let mut back = Vec::new();
        let in_flow = self.planner.counts().running > 0;
        while self.attached
            && let Some(plan) = self.planner.plan(now, events)
        {
            let step = self.ledger.book(&plan, &ends_at)?;
            self.conserves()?;
            self.step += 1;
            if setup.full_check_every > 0 && self.step.is_multiple_of(setup.full_check_every) {
                self.planner.check().map_err(|imbalance| imbalance.to_string())?;
            }
            if self.dead {
                continue;
            }
            let busy = setup.cost.step_time(step.load);
            self.plan_arrives = self.plan_arrives.max(now + Network::hop(rng));
            let idle = self.plan_arrives.saturating_sub(self.device_free);
            if in_flow || !self.out.is_empty() {
                self.sums.idle_secs += idle.as_secs_f64();
            }
            let start = self.plan_arrives.max(self.device_free);
            self.device_free = start + busy;
            let last = self.out.back().map_or(Duration::ZERO, |out| out.back_at);
            let back_at = last.max(self.device_free + Network::hop(rng));
            self.sum(setup, plan, step.tokens, step.load.decodes, busy);
            self.out.push_back(Out { drawn: step.drawn, busy, back_at });
            back.push(back_at);
        }
        Ok(back)
    }

    /// Takes the oldest output.
    ///
    /// # Errors
    /// What it contradicts.
    pub fn apply(&mut self, events: &mut Events) -> Result<Duration, String> {
        let out = self.out.pop_front().ok_or("an output that nobody asked for")?;
        self.outputs += 1;
        self.planner.apply(out.drawn, vec![], out.busy, events).map_err(|error| error.to_string())?;
        Ok(out.busy)
    }

    /// Right behind a plan, the executor's books and the policy's counts must agree: blocks and sequences conserve.
    fn conserves(&self) -> Result<(), String> {
        let counts = self.planner.counts();
        let (open, blocks) = self.ledger.held();
        let used = counts.total_blocks - counts.free_blocks;
        if (open, blocks) == (counts.running, used) {
            return Ok(());
        }
        Err(format!("{open} sequences hold {blocks} blocks, the policy counts {} and {used}", counts.running))
    }

    fn sum(
        &mut self,
        setup: &Setup,
        plan: millrace_scheduler::policy::Plan,
        tokens: usize,
        decodes: u64,
        busy: Duration,
    ) {
        let sums = &mut self.sums;
        sums.steps += 1;
        sums.tokens += tokens as u64;
        sums.decodes += decodes;
        sums.busy_secs += busy.as_secs_f64();
        let counts = self.planner.counts();
        if counts.waiting > 0 {
            sums.saturated_steps += 1;
            sums.saturated_tokens += tokens as u64;
            sums.saturated_running += counts.running as u64;
            sums.full_steps += u64::from(tokens == counts.step_tokens || counts.running == counts.max_running);
        }
        // Every sixteenth is enough for a mean.
        if setup.count_bytes && sums.steps % 16 == 1 {
            let Ok(scheduler) = ActorId::new("scheduler-4f1c2a9b7d") else { return };
            let entries = plan.work.len() as u64;
            let opens = !plan.open.is_empty();
            let body = StepPlan {
                scheduler,
                session: 1,
                step: sums.steps,
                release: plan.release,
                copies: plan.copies,
                open: plan.open,
                work: plan.work,
            };
            let bytes = postcard::to_stdvec(&body).map_or(0, |body| body.len() as u64);
            sums.plan_bytes += bytes * 16;
            if !opens {
                sums.work_bytes += bytes;
                sums.work_entries += entries;
            }
        }
    }
}

fn ledger(setup: &Setup) -> Ledger {
    // An eighth of a step is the policy's own reserve; the ledger holds it to the outer limits.
    Ledger::new(&setup.spec, setup.limits.step_tokens, setup.limits.max_running)
}

/// An engine like the H200 of the brief's performance.md: its memory behind the weights in blocks of 16 tokens.
pub fn h200_spec(
    blocks: u32,
    slots: u32,
    step_tokens: u32,
) -> Result<EngineSpec, millrace_protocol::ids::InvalidToken> {
    Ok(EngineSpec {
        model: millrace_protocol::ModelName::new("qwen3-4b")?,
        weights_hash: "w".into(),
        blocks,
        block_tokens: 16,
        slots,
        step_tokens,
        step_patches: 65_536,
        max_tokens: 40_960,
        vocab: 151_936,
        device: "simulated H200".into(),
    })
}
