//! What goes wrong in a run: cancellations, executors and schedulers that die, and the redeliveries that follow.

use std::time::Duration;

use millrace_scheduler::policy::Events;

use super::jobs::{End, Place};
use super::world::{Happening, World};

/// A dead executor is known to be dead after this.
const SILENCE: Duration = Duration::from_millis(1_500);
/// Until a new process is up.
const RESTART: Duration = Duration::from_secs(3);

impl World<'_> {
    pub(super) fn cancel(&mut self, job: u32) -> Result<(), String> {
        match self.records[job as usize].place {
            Place::Ended(_) | Place::Unborn => Ok(()),
            // Whoever pulls or is offered it finds that it has ended.
            Place::Queued | Place::Offered => {
                self.over(job, End::Cancelled);
                Ok(())
            }
            Place::Held(engine, seq) => {
                let engine = engine as usize;
                let before = self.engines[engine].planner.counts();
                if self.engines[engine].planner.remove(seq).is_none() {
                    return Err(format!("job {job} is held by engine {engine}, which does not know it"));
                }
                let after = self.engines[engine].planner.counts();
                if after.free_blocks < before.free_blocks
                    || after.running + after.waiting + 1 != before.running + before.waiting
                {
                    return Err(format!("job {job} was cancelled and still holds something: {before:?}, {after:?}"));
                }
                self.end(engine, job, End::Cancelled);
                self.settle(engine, Events::new())
            }
        }
    }

    pub(super) fn redeliver(&mut self, job: u32) {
        if !self.records[job as usize].is_over() {
            self.measures.redeliveries += 1;
            let spec = self.spec(job);
            self.enqueue(job, &spec);
        }
    }

    pub(super) fn next_death(&mut self, mean_secs: f64, happening: Happening) {
        if mean_secs > 0.0 {
            let wait = -mean_secs * (1.0 - self.rng.f64()).ln();
            self.after(Duration::from_secs_f64(wait), happening);
        }
    }

    pub(super) fn executor_dies(&mut self) {
        self.next_death(self.setup.executor_deaths_secs, Happening::ExecutorDies);
        let engine = self.rng.usize(0..self.engines.len());
        if self.engines[engine].attached {
            self.measures.executor_deaths += 1;
            self.engines[engine].die();
            let incarnation = self.engines[engine].incarnation;
            self.after(SILENCE, Happening::Detached { engine, incarnation });
        }
    }

    pub(super) fn detached(&mut self, engine: usize, incarnation: u32) -> Result<(), String> {
        if self.engines[engine].incarnation != incarnation {
            return Ok(());
        }
        let mut events = Events::new();
        self.engines[engine].detach(self.now, &mut events);
        self.beacon_due(engine);
        self.after(RESTART, Happening::Attach { engine, incarnation });
        self.settle(engine, events)
    }

    pub(super) fn attach(&mut self, engine: usize, incarnation: u32) -> Result<(), String> {
        if self.engines[engine].incarnation != incarnation || self.engines[engine].attached {
            return Ok(());
        }
        let mut events = Events::new();
        self.engines[engine].attach(self.setup, self.now, &mut events);
        self.beacon_due(engine);
        self.settle(engine, events)
    }

    pub(super) fn scheduler_dies(&mut self) {
        self.next_death(self.setup.scheduler_deaths_secs, Happening::SchedulerDies);
        let engine = self.rng.usize(0..self.engines.len());
        self.measures.scheduler_deaths += 1;
        let mut jobs: Vec<u32> = self.engines[engine].by_seq.values().copied().collect();
        jobs.sort_unstable();
        self.engines[engine].forget(self.setup);
        for job in jobs {
            self.records[job as usize].place = Place::Queued;
            self.after(self.setup.ack_wait, Happening::Redeliver(job));
        }
        self.routers.iter_mut().for_each(|router| router.skip(engine));
        let incarnation = self.engines[engine].incarnation;
        self.after(RESTART, Happening::Attach { engine, incarnation });
    }
}
