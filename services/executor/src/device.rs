//! The device thread: one named OS thread that owns the engine and runs plans one after another, the next one already on the
//! device while one runs.
//!
//! Owns the bounded hand-off to and from the engine. A panic or a fatal fault is reported once and ends the thread: a
//! device's state is unusable then, the process exits and redelivery does the rest.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use millrace_kernels::StepTimes;
use millrace_protocol::ActorId;
use millrace_protocol::plan::StepPlan;
use millrace_protocol::step::StepOutput;
use millrace_runtime::supervise::panic_text;
use millrace_runtime::{Clock, InFlight};
use tokio::sync::mpsc;

use crate::engine::{Collected, MediaSource, STEPS_IN_FLIGHT, StepEngine};

/// How long a step may have ended before that is seen, while no plan comes that would be seen at once.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// What the device thread is asked to do, in order.
#[derive(Debug)]
enum Command {
    /// Forget every slot: a new session begins.
    Reset,
    /// Run one step.
    Step(Box<StepPlan>),
}

/// What comes back.
#[derive(Debug)]
pub enum DeviceEvent {
    /// A step ran.
    Stepped {
        /// Who planned it.
        scheduler: ActorId,
        /// Its output, times filled in.
        output: Box<StepOutput>,
        /// Tokens that it ran.
        tokens: u64,
        /// How long the device was busy with it.
        busy: Duration,
        /// How long it had nothing to do since the step before.
        idle: Duration,
    },
    /// The thread is gone for this reason; the process must end.
    Died(String),
}

/// The hand-off is full: more plans are outstanding than were agreed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandOffError {
    /// More plans than the hand-off holds.
    #[error("more plans are outstanding than the executor holds")]
    Full,
    /// The thread ended.
    #[error("the device thread has ended")]
    Ended,
}

/// Handle of the device thread. Dropping it lets the thread end after the steps under way.
#[derive(Debug)]
pub struct Device {
    commands: SyncSender<Command>,
}

impl Device {
    /// Starts the thread. At most `depth` commands wait for it; `events` must be read. `in_use` is held until the thread has let
    /// the engine go: a process that ends before pulls the driver away under it.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(
        engine: Box<dyn StepEngine>,
        media: Box<dyn MediaSource + Send>,
        depth: usize,
        clock: Clock,
        events: mpsc::Sender<DeviceEvent>,
        in_use: Option<InFlight>,
    ) -> std::io::Result<Self> {
        let (commands, waiting) = sync_channel(depth);
        std::thread::Builder::new().name("device".into()).spawn(move || {
            let _in_use = in_use;
            let (mut media, told) = (media, events.clone());
            let worker = Worker { engine, clock, events, under_way: VecDeque::new(), free_since: None };
            let run = catch_unwind(AssertUnwindSafe(|| run(worker, media.as_mut(), &waiting)));
            if let Err(panic) = run {
                let text = format!("the device thread panicked: {}", panic_text(panic.as_ref()));
                // Nobody left to tell means that the process ends already.
                let _ = told.blocking_send(DeviceEvent::Died(text));
            }
        })?;
        Ok(Self { commands })
    }

    /// Hands a plan over without waiting.
    ///
    /// # Errors
    /// [`HandOffError`] if it is not taken.
    pub fn step(&self, plan: StepPlan) -> Result<(), HandOffError> {
        self.send(Command::Step(Box::new(plan)))
    }

    /// Forgets every slot, after the steps that are already handed over.
    ///
    /// # Errors
    /// [`HandOffError`] if it is not taken.
    pub fn reset(&self) -> Result<(), HandOffError> {
        self.send(Command::Reset)
    }

    fn send(&self, command: Command) -> Result<(), HandOffError> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => HandOffError::Full,
            TrySendError::Disconnected(_) => HandOffError::Ended,
        })
    }
}

/// A step that was launched.
struct Step {
    scheduler: ActorId,
    tokens: u64,
    launched: Instant,
}

/// The thread's state.
struct Worker {
    engine: Box<dyn StepEngine>,
    clock: Clock,
    events: mpsc::Sender<DeviceEvent>,
    under_way: VecDeque<Step>,
    /// When the last step ended; `None` before the first one of a session, which did not wait for anybody.
    free_since: Option<Instant>,
}

/// The thread has to end: a fault was reported, or nobody listens.
struct Ended;

/// Launches a plan as soon as there is one and room for it, and gives each step's output away as soon as it has ended.
fn run(mut worker: Worker, media: &mut dyn MediaSource, commands: &Receiver<Command>) -> Result<(), Ended> {
    let mut held: Option<Box<StepPlan>> = None;
    loop {
        let full = worker.under_way.len() >= STEPS_IN_FLIGHT;
        let waits = full || held.as_ref().is_some_and(|plan| worker.engine.must_wait(plan));
        if !worker.under_way.is_empty() && (waits || worker.engine.has_ended()) {
            worker.collect()?;
            continue;
        }
        let command = match held.take() {
            Some(plan) => Ok(Command::Step(plan)),
            None if worker.under_way.is_empty() => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            None => commands.recv_timeout(LOOK_EVERY),
        };
        match command {
            Ok(Command::Step(plan)) if worker.engine.must_wait(&plan) => held = Some(plan),
            Ok(Command::Step(plan)) => worker.launch(&plan, media)?,
            Ok(Command::Reset) => {
                worker.collect_all()?;
                worker.engine.reset();
                worker.free_since = None;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return worker.collect_all(),
        }
    }
}

impl Worker {
    fn launch(&mut self, plan: &StepPlan, media: &mut dyn MediaSource) -> Result<(), Ended> {
        let (scheduler, launched) = (plan.scheduler.clone(), self.clock.now());
        let tokens = plan.work.iter().map(|work| u64::from(work.count)).sum();
        self.engine.launch(plan, media);
        let took = self.clock.now().saturating_duration_since(launched);
        tracing::trace!(step = plan.step, tokens, took_us = micros(took), "step launched");
        self.under_way.push_back(Step { scheduler, tokens, launched });
        self.check()
    }

    /// Waits for the oldest step and gives its output away.
    fn collect(&mut self) -> Result<(), Ended> {
        let (Some(step), Some(collected)) = (self.under_way.pop_front(), self.engine.collect()) else { return Ok(()) };
        let ended = self.clock.now();
        let Step { scheduler, tokens, launched } = step;
        let waited_since = self.free_since.replace(ended);
        let Collected { mut output, times } = collected;
        let by_clock = || StepTimes {
            busy: ended.saturating_duration_since(launched),
            idle: waited_since.map_or(Duration::ZERO, |free| launched.saturating_duration_since(free)),
        };
        let StepTimes { busy, idle } = times.unwrap_or_else(by_clock);
        let idle = if waited_since.is_some() { idle } else { Duration::ZERO };
        output.busy_us = micros(busy);
        output.idle_us = micros(idle);
        tracing::trace!(step = output.step, tokens, busy_us = output.busy_us, idle_us = output.idle_us, "step ended");
        self.check()?;
        self.send(DeviceEvent::Stepped { scheduler, output: Box::new(output), tokens, busy, idle })
    }

    fn collect_all(&mut self) -> Result<(), Ended> {
        while !self.under_way.is_empty() {
            self.collect()?;
        }
        Ok(())
    }

    /// Reports a fault: an output would only say that the session broke; the process ends, and everyone learns that at once.
    fn check(&self) -> Result<(), Ended> {
        let Some(why) = self.engine.fault() else { return Ok(()) };
        self.send(DeviceEvent::Died(why.to_owned()))?;
        Err(Ended)
    }

    fn send(&self, event: DeviceEvent) -> Result<(), Ended> {
        self.events.blocking_send(event).map_err(|_| Ended)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
