//! The device thread: one named OS thread that owns the engine and runs plans one after another.
//!
//! Owns the bounded hand-off to and from the engine. A panic or a fatal fault is reported once and ends the thread: a
//! device's state is unusable then, the process exits and redelivery does the rest.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use millrace_protocol::ActorId;
use millrace_protocol::plan::StepPlan;
use millrace_protocol::step::StepOutput;
use millrace_runtime::Clock;
use millrace_runtime::supervise::panic_text;
use tokio::sync::mpsc;

use crate::engine::{MediaSource, StepEngine};

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
        /// How long the device was busy.
        busy: Duration,
        /// How long it waited for this plan.
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

/// Handle of the device thread. Dropping it lets the thread end after the step it runs.
#[derive(Debug)]
pub struct Device {
    commands: SyncSender<Command>,
}

impl Device {
    /// Starts the thread. At most `depth` commands wait for it; `events` must be read.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(
        engine: Box<dyn StepEngine>,
        media: Box<dyn MediaSource + Send>,
        depth: usize,
        clock: Clock,
        events: mpsc::Sender<DeviceEvent>,
    ) -> std::io::Result<Self> {
        let (commands, waiting) = sync_channel(depth);
        std::thread::Builder::new().name("device".into()).spawn(move || {
            let run = catch_unwind(AssertUnwindSafe(|| run(engine, media, &waiting, &clock, &events)));
            if let Err(panic) = run {
                let text = format!("the device thread panicked: {}", panic_text(panic.as_ref()));
                // Nobody left to tell means that the process ends already.
                let _ = events.blocking_send(DeviceEvent::Died(text));
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

fn run(
    mut engine: Box<dyn StepEngine>,
    mut media: Box<dyn MediaSource + Send>,
    commands: &Receiver<Command>,
    clock: &Clock,
    events: &mpsc::Sender<DeviceEvent>,
) {
    let mut free_since: Option<Instant> = None;
    while let Ok(command) = commands.recv() {
        let plan = match command {
            Command::Reset => {
                engine.reset();
                free_since = None;
                continue;
            }
            Command::Step(plan) => plan,
        };
        let started = clock.now();
        let idle = free_since.map_or(Duration::ZERO, |free| started.saturating_duration_since(free));
        let tokens = plan.work.iter().map(|work| u64::from(work.count)).sum();
        let mut output = engine.step(&plan, media.as_mut());
        let ended = clock.now();
        let busy = ended.saturating_duration_since(started);
        free_since = Some(ended);
        output.busy_us = micros(busy);
        output.idle_us = micros(idle);
        if let Some(why) = engine.fault() {
            // The output would only say that the session broke; the process ends, and everyone learns that at once.
            let _ = events.blocking_send(DeviceEvent::Died(why.to_owned()));
            return;
        }
        let output = Box::new(output);
        if events.blocking_send(DeviceEvent::Stepped { scheduler: plan.scheduler, output, tokens, busy, idle }).is_err()
        {
            return;
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
