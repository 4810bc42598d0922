//! An executor that speaks the protocol over NATS and answers as it is scripted. It computes one step for each permit of
//! its gate, so that a test decides how far things go.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use millrace_bus::{Bus, Subscription};
use millrace_protocol::engine::{Attach, AttachReply, EngineCosts, EngineSpec, ExecutorBeacon};
use millrace_protocol::plan::StepPlan;
use millrace_protocol::step::{SlotToken, StepOutput};
use millrace_protocol::{ActorId, ErrorCode, JobError, SlotId};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::support::{END, actor_id, model, tokens};

/// What goes wrong, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Never hears of the plan with this number.
    LosesPlan(u64),
    /// Computes this step, but its output does not arrive.
    LosesOutput(u64),
    /// After this many steps hears nothing more; it still beats.
    DeafAfter(u64),
}

/// A running executor.
pub struct Executor {
    pub gate: Arc<Semaphore>,
    task: JoinHandle<()>,
}

struct Slot {
    job: String,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    position: usize,
    failed: bool,
}

struct State {
    bus: Bus,
    id: ActorId,
    spec: EngineSpec,
    answers: HashMap<String, Vec<u32>>,
    holder: Option<ActorId>,
    session: u64,
    next_step: u64,
    steps: u64,
    slots: HashMap<SlotId, Slot>,
    pending: VecDeque<StepPlan>,
    failing: Option<(String, JobError)>,
    fault: Option<Fault>,
}

pub fn spec() -> EngineSpec {
    EngineSpec {
        model: model(),
        weights_hash: "w".into(),
        blocks: 64,
        block_tokens: 16,
        slots: 8,
        step_tokens: 64,
        step_patches: 64,
        max_tokens: 512,
        vocab: 1024,
        device: "scripted".into(),
    }
}

impl Executor {
    /// Starts one whose answers are these texts, by job.
    pub async fn start(bus: &Bus, name: &str, answers: &[(&str, &str)]) -> Self {
        Self::failing(bus, name, answers, None).await
    }

    /// As [`Self::start`], with a fault.
    pub async fn faulty(bus: &Bus, name: &str, answers: &[(&str, &str)], fault: Fault) -> Self {
        Self::with(bus, name, answers, None, Some(fault)).await
    }

    /// As [`Self::start`]; the first step of one job fails for that job.
    pub async fn failing(bus: &Bus, name: &str, answers: &[(&str, &str)], failing: Option<(&str, ErrorCode)>) -> Self {
        Self::with(bus, name, answers, failing, None).await
    }

    async fn with(
        bus: &Bus,
        name: &str,
        answers: &[(&str, &str)],
        failing: Option<(&str, ErrorCode)>,
        fault: Option<Fault>,
    ) -> Self {
        let id = actor_id(name);
        let subjects = bus.subjects();
        let attach = bus.subscribe(&subjects.attach(&id), 100, None).await.unwrap();
        let plans = bus.subscribe(&subjects.plan(&id), 100, None).await.unwrap();
        let gate = Arc::new(Semaphore::new(0));
        let state = State {
            bus: bus.clone(),
            id,
            spec: spec(),
            answers: answers.iter().map(|(job, text)| ((*job).to_owned(), tokens(text))).collect(),
            holder: None,
            session: 100,
            next_step: 1,
            steps: 0,
            slots: HashMap::new(),
            pending: VecDeque::new(),
            failing: failing.map(|(job, code)| (job.to_owned(), JobError::new(code, "scripted"))),
            fault,
        };
        let task = tokio::spawn(state.run(attach, plans, Arc::clone(&gate)));
        Self { gate, task }
    }

    /// Lets it compute as much as it is asked to.
    pub fn open(&self) {
        self.gate.add_permits(100_000);
    }

    /// Lets it compute so many steps more.
    pub fn steps(&self, count: usize) {
        self.gate.add_permits(count);
    }

    /// Dies without a word.
    pub fn kill(self) {
        self.task.abort();
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl State {
    async fn run(mut self, mut attach: Subscription, mut plans: Subscription, gate: Arc<Semaphore>) {
        let mut beacons = tokio::time::interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                _ = beacons.tick() => self.beacon().await,
                Some(request) = attach.next() => {
                    if self.is_deaf() {
                        continue;
                    }
                    let reply = self.attach(&postcard::from_bytes(&request.payload).unwrap());
                    let body = postcard::to_stdvec(&reply).unwrap();
                    self.bus.reply(&request, body.into()).await.unwrap();
                }
                Some(plan) = plans.next() => {
                    let plan: StepPlan = postcard::from_bytes(&plan.payload).unwrap();
                    if self.is_deaf() || self.fault.take_if(|fault| *fault == Fault::LosesPlan(plan.step)).is_some() {
                        continue;
                    }
                    if plan.session == self.session && Some(&plan.scheduler) == self.holder.as_ref() {
                        assert_eq!(plan.step, self.next_step);
                        self.next_step += 1;
                        self.pending.push_back(plan);
                    }
                }
                permit = gate.acquire(), if !self.pending.is_empty() => {
                    permit.unwrap().forget();
                    self.step().await;
                }
            }
        }
    }

    fn is_deaf(&self) -> bool {
        matches!(self.fault, Some(Fault::DeafAfter(steps)) if self.steps >= steps)
    }

    async fn beacon(&self) {
        let beacon = ExecutorBeacon {
            executor: self.id.clone(),
            spec: self.spec.clone(),
            attached_to: self.holder.clone(),
            steps: self.steps,
        };
        let body = serde_json::to_vec(&beacon).unwrap();
        // While the server is away nobody hears it.
        let _ = self.bus.publish(&self.bus.subjects().executor_beacon(&self.id), body.into()).await;
    }

    fn attach(&mut self, request: &Attach) -> AttachReply {
        if request.detach {
            self.holder = None;
            return AttachReply::Detached;
        }
        match (request.session, &self.holder) {
            (Some(session), Some(holder)) if session == self.session && *holder == request.scheduler => {}
            (Some(_), _) => return AttachReply::Lost,
            (None, Some(by)) if *by != request.scheduler => return AttachReply::Held { by: by.clone() },
            (None, _) => {
                self.session += 1;
                self.holder = Some(request.scheduler.clone());
                self.next_step = 1;
                self.slots.clear();
                self.pending.clear();
            }
        }
        let answered_step = self.next_step - 1 - self.pending.len() as u64;
        let (session, spec, costs) = (self.session, self.spec.clone(), EngineCosts::default());
        AttachReply::Attached { session, spec, costs, heard_step: self.next_step - 1, answered_step }
    }

    async fn step(&mut self) {
        let plan = self.pending.pop_front().unwrap();
        self.steps += 1;
        for slot in plan.release {
            self.slots.remove(&slot).expect("an open slot");
        }
        for open in plan.open {
            let slot = Slot {
                job: open.job.to_string(),
                prompt_tokens: open.prompt_tokens as usize,
                tokens: open.tokens,
                position: open.cached_tokens as usize,
                failed: false,
            };
            assert!(self.slots.insert(open.slot, slot).is_none());
        }
        let (mut drawn, mut failed) = (Vec::new(), Vec::new());
        for work in plan.work {
            let slot = self.slots.get_mut(&work.slot).expect("an open slot");
            if let Some((_, error)) = self.failing.take_if(|(job, _)| *job == slot.job) {
                failed.push((work.slot, error));
                slot.failed = true;
            }
            if slot.failed {
                continue;
            }
            slot.position += work.count as usize;
            assert_eq!(work.sample, slot.position == slot.tokens.len());
            if work.sample {
                let answer = &self.answers[&slot.job];
                let token = answer.get(slot.tokens.len() - slot.prompt_tokens).copied().unwrap_or(END);
                slot.tokens.push(token);
                drawn.push(SlotToken { slot: work.slot, token, logprobs: None });
            }
        }
        let output = StepOutput {
            executor: self.id.clone(),
            session: plan.session,
            step: plan.step,
            tokens: drawn,
            failed,
            broken: None,
            busy_us: 100,
            idle_us: 0,
        };
        if self.fault.take_if(|fault| *fault == Fault::LosesOutput(plan.step)).is_some() {
            return;
        }
        let body = postcard::to_stdvec(&output).unwrap();
        let _ = self.bus.publish(&self.bus.subjects().step(&plan.scheduler), body.into()).await;
    }
}
