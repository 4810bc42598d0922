//! The event loop: jobs are published, prepared, offered, planned, computed, shown, ended, on virtual time. Events at one
//! moment happen in the order in which they were made. Stops at the first invariant that does not hold.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use fastrand::Rng;
use millrace_protocol::JobId;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_scheduler::policy::{Event, Events, NewSequence};

use super::engine::Engine;
use super::jobs::{End, Place, Record};
use super::ledger::{END_TOKEN, token};
use super::report::{Measures, Report};
use super::router::Router;
use super::scenario::Setup;
use super::traffic::{Messages, Network};
use super::workload::{ArrivalClock, JobSpec};

/// Grid on which actors look at deadlines and send beacons.
const TICK: Duration = Duration::from_millis(25);

/// An invariant that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "scenario {scenario}, seed {seed}, at {at:?}: {what}\nalone: cargo run -p millrace-tests --bin millrace-sim -- {scenario} --seed {seed}"
)]
pub struct Violation {
    /// Settings.
    pub scenario: String,
    /// Repeats it.
    pub seed: u64,
    /// Virtual time.
    pub at: Duration,
    /// What is wrong.
    pub what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Happening {
    Publish(u32),
    Prepared(u32),
    Offer { job: u32, engine: usize, pre: usize },
    Output { engine: usize, incarnation: u32 },
    Beacon(usize),
    Wake(usize),
    Cancel(u32),
    Redeliver(u32),
    ExecutorDies,
    SchedulerDies,
    Detached { engine: usize, incarnation: u32 },
    Attach { engine: usize, incarnation: u32 },
}

/// A class's way to the schedulers.
#[derive(Debug, Default)]
struct Class {
    /// Not pulled yet.
    queue: VecDeque<u32>,
    /// Prepared, and nobody has room.
    ready: VecDeque<u32>,
    /// Permits that are free.
    credits: usize,
}

pub(super) struct World<'a> {
    pub(super) setup: &'a Setup,
    pub(super) now: Duration,
    heap: BinaryHeap<Reverse<(Duration, u64, Happening)>>,
    made: u64,
    pub(super) rng: Rng,
    arrivals: ArrivalClock,
    pub(super) records: Vec<Record>,
    pub(super) engines: Vec<Engine>,
    pub(super) routers: Vec<Router>,
    /// Interactive, others; credits of all preprocess actors together.
    classes: [Class; 2],
    messages: Messages,
    pub(super) measures: Measures,
    unfinished: u32,
}

/// Runs a setup to its end.
///
/// # Errors
/// [`Violation`]: the first invariant that did not hold.
pub fn run(setup: &Setup) -> Result<Report, Violation> {
    let mut world = World::new(setup);
    match world.run() {
        Ok(()) => Ok(Report::of(setup, &world.measures, &world.records, &world.engines, world.messages, world.now)),
        Err(what) => Err(Violation { scenario: setup.name.clone(), seed: setup.seed, at: world.now, what }),
    }
}

impl<'a> World<'a> {
    fn new(setup: &'a Setup) -> Self {
        let (actors, interactive, others) = setup.preprocess;
        let class = |credits| Class { credits: credits * actors, ..Class::default() };
        let engines: Vec<_> = (0..setup.engines).map(|_| Engine::new(setup, Duration::ZERO)).collect();
        let mut routers: Vec<_> = (0..actors).map(|_| Router::new(setup.engines)).collect();
        for (index, engine) in engines.iter().enumerate() {
            let room = (engine.free_jobs(setup.waiting), engine.planner.counts().free_blocks);
            routers.iter_mut().for_each(|router| router.hear(index, room.0, room.1));
        }
        Self {
            setup,
            now: Duration::ZERO,
            heap: BinaryHeap::new(),
            made: 0,
            rng: Rng::with_seed(setup.seed),
            arrivals: setup.workload.clock(setup.seed),
            records: vec![Record::UNBORN; setup.workload.jobs as usize],
            engines,
            routers,
            classes: [class(interactive), class(others)],
            messages: Messages::default(),
            measures: Measures::new(setup),
            unfinished: setup.workload.jobs,
        }
    }

    pub(super) fn after(&mut self, wait: Duration, happening: Happening) {
        self.at(self.now + wait, happening);
    }

    fn at(&mut self, at: Duration, happening: Happening) {
        self.made += 1;
        self.heap.push(Reverse((at.max(self.now), self.made, happening)));
    }

    pub(super) fn spec(&self, job: u32) -> JobSpec {
        self.setup.workload.job(self.setup.seed, job)
    }

    fn run(&mut self) -> Result<(), String> {
        if self.setup.workload.jobs > 0 {
            let first = self.arrivals.tick();
            self.at(first, Happening::Publish(0));
        }
        self.next_death(self.setup.executor_deaths_secs, Happening::ExecutorDies);
        self.next_death(self.setup.scheduler_deaths_secs, Happening::SchedulerDies);
        while self.unfinished > 0 {
            let Some(Reverse((at, _, happening))) = self.heap.pop() else {
                return Err(format!("{} jobs are left and nothing happens any more", self.unfinished));
            };
            self.now = at;
            if at > self.setup.end_by {
                return Err(format!("{} jobs have not ended by {:?}", self.unfinished, self.setup.end_by));
            }
            self.happen(happening)?;
        }
        self.all_is_given_back()
    }

    fn happen(&mut self, happening: Happening) -> Result<(), String> {
        match happening {
            Happening::Publish(job) => self.publish(job),
            Happening::Prepared(job) => self.prepared(job),
            Happening::Offer { job, engine, pre } => self.offered(job, engine, pre)?,
            Happening::Output { engine, incarnation } => self.output(engine, incarnation)?,
            Happening::Beacon(engine) => self.beacon(engine),
            Happening::Wake(engine) => self.settle(engine, Events::new())?,
            Happening::Cancel(job) => self.cancel(job)?,
            Happening::Redeliver(job) => self.redeliver(job),
            Happening::ExecutorDies => self.executor_dies(),
            Happening::SchedulerDies => self.scheduler_dies(),
            Happening::Detached { engine, incarnation } => self.detached(engine, incarnation)?,
            Happening::Attach { engine, incarnation } => self.attach(engine, incarnation)?,
        }
        Ok(())
    }

    fn publish(&mut self, job: u32) {
        if job + 1 < self.setup.workload.jobs {
            let next = self.arrivals.tick();
            self.at(next, Happening::Publish(job + 1));
        }
        let spec = self.spec(job);
        let record = &mut self.records[job as usize];
        (record.published, record.place) = (self.now, Place::Queued);
        self.messages.jobs += 1;
        if let Some(after) = spec.cancel_after {
            self.after(after, Happening::Cancel(job));
        }
        self.enqueue(job, &spec);
    }

    pub(super) fn enqueue(&mut self, job: u32, spec: &JobSpec) {
        self.classes[usize::from(!spec.interactive)].queue.push_back(job);
        self.pull();
    }

    /// Preprocess actors pull against their credits; a pulled job keeps its credit until a scheduler has it.
    fn pull(&mut self) {
        for class in 0..2 {
            while self.classes[class].credits > 0
                && let Some(job) = self.classes[class].queue.pop_front()
            {
                if self.records[job as usize].is_over() {
                    continue;
                }
                self.classes[class].credits -= 1;
                self.messages.job_control += Messages::CONTROL_OF_JOB;
                let wait = Network::append(&mut self.rng) + Network::preprocess(self.spec(job).prompt);
                self.after(wait, Happening::Prepared(job));
            }
        }
    }

    fn prepared(&mut self, job: u32) {
        let class = usize::from(!self.spec(job).interactive);
        self.classes[class].ready.push_back(job);
        self.offer_ready();
    }

    /// Interactive jobs first; each goes to the roomiest scheduler that its own preprocess actor knows of.
    fn offer_ready(&mut self) {
        for class in 0..2 {
            while let Some(&job) = self.classes[class].ready.front() {
                if self.records[job as usize].is_over() {
                    self.classes[class].ready.pop_front();
                    self.classes[class].credits += 1;
                    continue;
                }
                let pre = job as usize % self.routers.len();
                let chosen = match self.setup.two_choices {
                    true => self.routers[pre].choose_of_two(&mut self.rng),
                    false => self.routers[pre].choose(),
                };
                let Some(engine) = chosen else { break };
                self.classes[class].ready.pop_front();
                self.records[job as usize].place = Place::Offered;
                self.messages.job_control += 2;
                let hop = Network::hop(&mut self.rng);
                self.after(hop, Happening::Offer { job, engine, pre });
            }
        }
        self.pull();
    }

    fn offered(&mut self, job: u32, engine: usize, pre: usize) -> Result<(), String> {
        let spec = self.spec(job);
        let class = usize::from(!spec.interactive);
        if self.records[job as usize].is_over() {
            self.classes[class].credits += 1;
            self.pull();
            return Ok(());
        }
        if self.engines[engine].free_jobs(self.setup.waiting) == 0 {
            self.measures.busy_answers += 1;
            self.routers[pre].skip(engine);
            self.records[job as usize].place = Place::Queued;
            self.classes[class].ready.push_front(job);
            // A beacon tells when there is room again.
            self.beacon_due(engine);
            return Ok(());
        }
        self.classes[class].credits += 1;
        self.accept(job, engine, &spec)?;
        self.pull();
        Ok(())
    }

    fn accept(&mut self, job: u32, engine: usize, spec: &JobSpec) -> Result<(), String> {
        let record = &mut self.records[job as usize];
        record.accepted.get_or_insert(self.now);
        record.attempts += 1;
        self.messages.claims_and_finals += 1;
        let deadline = spec.deadline.map(|after| record.published + after);
        let new = NewSequence {
            job: JobId::new(job.to_string()).map_err(|error| error.to_string())?,
            prompt: (0..spec.prompt).map(|place| prompt_token(job, spec, place)).collect(),
            answer: (0..record.tokens as usize).map(|place| token(job, place)).collect(),
            media: vec![],
            sampling: ResolvedSampling::greedy(),
            max_tokens: spec.max_tokens,
            stop_token_ids: if spec.stops { vec![END_TOKEN] } else { vec![] },
            may_stop_on_text: false,
            priority: spec.priority,
            tenant: spec.tenant.to_string(),
            deadline,
        };
        let mut events = Events::new();
        self.engines[engine].held += 1;
        let seq = self.engines[engine].submit(job, new, self.now, &mut events);
        self.records[job as usize].place = Place::Held(engine as u32, seq);
        if let Some(deadline) = deadline {
            self.at(deadline, Happening::Wake(engine));
        }
        self.settle(engine, events)
    }

    /// Plans, and carries out what happened, until nothing happens any more.
    pub(super) fn settle(&mut self, engine: usize, mut events: Events) -> Result<(), String> {
        loop {
            let (setup, now) = (self.setup, self.now);
            let ends_at = |name: &str| {
                let job = name.parse().unwrap_or(u32::MAX);
                let spec = setup.workload.job(setup.seed, job);
                (job, spec.stops.then_some(spec.answer as usize))
            };
            let fault = |what| format!("engine {engine}: {what}");
            let back = self.engines[engine].pump(setup, now, &mut self.rng, &mut events, ends_at).map_err(fault)?;
            self.messages.steps += 2 * back.len() as u64;
            let incarnation = self.engines[engine].incarnation;
            for at in back {
                self.at(at, Happening::Output { engine, incarnation });
            }
            if events.is_empty() {
                return Ok(());
            }
            for (seq, event) in std::mem::take(&mut events) {
                let Some(&job) = self.engines[engine].by_seq.get(&seq) else {
                    return Err(format!("engine {engine}: {event:?} for a job that has ended"));
                };
                self.carry_out(engine, job, event)?;
            }
        }
    }

    fn carry_out(&mut self, engine: usize, job: u32, event: Event) -> Result<(), String> {
        let spec = self.spec(job);
        match event {
            Event::Admitted { cached_tokens, again } => {
                self.measures.admitted(&mut self.records[job as usize], &spec, cached_tokens, again, self.now);
                self.beacon_due(engine);
            }
            Event::Preempted => self.measures.preemptions += 1,
            Event::Token { token, .. } => {
                let record = &mut self.records[job as usize];
                let before = record.first_token.map(|_| (record.last_token, record.last_step));
                record.show(job, token, &spec, self.now)?;
                record.last_step = self.engines[engine].outputs;
                self.measures.token(record, before, &spec, self.now);
                let gap = if spec.interactive { Duration::ZERO } else { self.setup.coalesce };
                if self.now - record.last_delta >= gap || record.tokens == 1 {
                    record.last_delta = self.now;
                    self.messages.deltas += 1;
                }
            }
            Event::Finished { .. } => {
                let shown = self.records[job as usize].tokens;
                if shown != spec.answer {
                    return Err(format!("job {job} ends with {shown} of {} tokens", spec.answer));
                }
                self.end(engine, job, End::Done);
            }
            Event::Expired => {
                if spec.deadline.is_none() {
                    return Err(format!("job {job} has no deadline and expires"));
                }
                self.end(engine, job, End::Expired);
            }
            Event::Refused(_) => self.end(engine, job, End::Refused),
            Event::Failed(_) => self.end(engine, job, End::Poison),
        }
        Ok(())
    }

    pub(super) fn end(&mut self, engine: usize, job: u32, how: End) {
        if let Place::Held(_, seq) = self.records[job as usize].place {
            self.engines[engine].by_seq.remove(&seq);
            self.engines[engine].held -= 1;
        }
        self.over(job, how);
        self.beacon_due(engine);
    }

    pub(super) fn over(&mut self, job: u32, how: End) {
        let spec = self.spec(job);
        let record = &mut self.records[job as usize];
        (record.place, record.ended) = (Place::Ended(how), self.now);
        self.unfinished -= 1;
        self.messages.claims_and_finals += 1;
        self.measures.ended(record, &spec, self.now);
    }

    fn output(&mut self, engine: usize, incarnation: u32) -> Result<(), String> {
        if self.engines[engine].incarnation != incarnation {
            return Ok(());
        }
        let mut events = Events::new();
        let busy = self.engines[engine].apply(&mut events).map_err(|what| format!("engine {engine}: {what}"))?;
        self.measures.step_secs.add(busy.as_secs_f64());
        self.settle(engine, events)
    }

    pub(super) fn beacon_due(&mut self, engine: usize) {
        if !std::mem::replace(&mut self.engines[engine].beacon_scheduled, true) {
            let tick = TICK.as_nanos() as u64;
            let next = (self.now.as_nanos() as u64 / tick + 1) * tick;
            self.messages.beacons += 1;
            let heard = Duration::from_nanos(next) + Network::hop(&mut self.rng);
            self.at(heard, Happening::Beacon(engine));
        }
    }

    fn beacon(&mut self, engine: usize) {
        let state = &mut self.engines[engine];
        state.beacon_scheduled = false;
        let room = (state.free_jobs(self.setup.waiting), state.planner.counts().free_blocks);
        self.routers.iter_mut().for_each(|router| router.hear(engine, room.0, room.1));
        self.offer_ready();
    }

    /// At the end nothing may be held any more.
    fn all_is_given_back(&self) -> Result<(), String> {
        for (index, engine) in self.engines.iter().enumerate() {
            let counts = engine.planner.counts();
            engine.planner.check().map_err(|imbalance| format!("engine {index}: {imbalance}"))?;
            if (counts.running, counts.waiting, engine.held) != (0, 0, 0) || counts.free_blocks != counts.total_blocks {
                return Err(format!("engine {index} holds something at the end: {counts:?}, {} jobs", engine.held));
            }
        }
        match self.records.iter().position(|record| !record.is_over()) {
            Some(job) => Err(format!("job {job} is lost: {:?}", self.records[job].place)),
            None => Ok(()),
        }
    }
}

fn prompt_token(job: u32, spec: &JobSpec, place: u32) -> u32 {
    if place < spec.shared {
        100 + spec.tenant * 1_000 + place
    } else {
        10_000 + job.wrapping_mul(977).wrapping_add(place) % 100_000
    }
}
