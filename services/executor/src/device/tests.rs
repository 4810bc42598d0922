//! Order of launches and outputs, against an engine that writes down what it is asked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use millrace_protocol::engine::EngineSpec;
use millrace_protocol::{ErrorCode, JobError, ModelName, PageRef};

use super::*;
use crate::engine::RowLogits;

/// What the engine was asked and what it is told.
#[derive(Debug, Default)]
struct Watch {
    asked: Mutex<Vec<String>>,
    /// Whether steps under way have ended.
    ended: AtomicBool,
}

impl Watch {
    fn note(&self, what: &str, step: u64) {
        self.asked.lock().unwrap().push(format!("{what} {step}"));
    }
}

struct Fake {
    watch: Arc<Watch>,
    under_way: VecDeque<StepPlan>,
    /// Whose draws are the host's.
    hosts: Option<u64>,
    /// Whose launch fails the device.
    fails: Option<u64>,
    fault: Option<String>,
}

impl StepEngine for Fake {
    fn spec(&self) -> EngineSpec {
        EngineSpec {
            model: ModelName::new("m").unwrap(),
            weights_hash: String::new(),
            blocks: 1,
            block_tokens: 1,
            slots: 1,
            step_tokens: 1,
            step_patches: 0,
            max_tokens: 1,
            vocab: 1,
            device: String::new(),
        }
    }
    fn reset(&mut self) {
        self.watch.note("reset", self.under_way.len() as u64);
    }
    fn launch(&mut self, plan: &StepPlan, _: &mut dyn MediaSource) {
        self.watch.note("launch", plan.step);
        self.under_way.push_back(plan.clone());
        if self.fails == Some(plan.step) {
            self.fault = Some("gone".into());
        }
    }
    fn must_wait(&self, plan: &StepPlan) -> bool {
        !self.under_way.is_empty() && self.hosts == Some(plan.step)
    }
    fn has_ended(&self) -> bool {
        self.watch.ended.load(Ordering::SeqCst)
    }
    fn collect(&mut self) -> Option<Collected> {
        let plan = self.under_way.pop_front()?;
        self.watch.note("collect", plan.step);
        let times = StepTimes { busy: Duration::from_micros(500), idle: Duration::from_micros(7) };
        let output = StepOutput {
            executor: ActorId::new("e").unwrap(),
            session: plan.session,
            step: plan.step,
            tokens: vec![],
            failed: vec![],
            broken: None,
            busy_us: 0,
            idle_us: 0,
        };
        Some(Collected { output, times: Some(times) })
    }
    fn step(&mut self, plan: &StepPlan, media: &mut dyn MediaSource) -> StepOutput {
        self.launch(plan, media);
        self.collect().unwrap().output
    }
    fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }
    fn take_logits(&mut self) -> Vec<RowLogits> {
        Vec::new()
    }
}

struct NoMedia;

impl MediaSource for NoMedia {
    fn patches(&mut self, _: &PageRef) -> Result<Bytes, JobError> {
        Err(JobError::new(ErrorCode::Internal, "no media"))
    }
}

fn plan(step: u64) -> StepPlan {
    let scheduler = ActorId::new("s").unwrap();
    StepPlan { scheduler, session: 1, step, release: vec![], copies: vec![], open: vec![], work: vec![] }
}

/// A device whose steps end only when the watch says so, or when they are waited for.
fn device(hosts: Option<u64>, fails: Option<u64>) -> (Device, Arc<Watch>, mpsc::Receiver<DeviceEvent>) {
    let watch = Arc::new(Watch::default());
    let engine = Fake { watch: watch.clone(), under_way: VecDeque::new(), hosts, fails, fault: None };
    let (sender, events) = mpsc::channel(8);
    let device = Device::start(Box::new(engine), Box::new(NoMedia), 8, Clock::system(), sender, None).unwrap();
    (device, watch, events)
}

/// Step, busy and idle microseconds.
fn stepped(events: &mut mpsc::Receiver<DeviceEvent>) -> (u64, u64, u64) {
    match events.blocking_recv() {
        Some(DeviceEvent::Stepped { output, .. }) => (output.step, output.busy_us, output.idle_us),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_plan_is_launched_while_another_runs_and_outputs_do_not_wait_for_plans() {
    let (device, watch, mut events) = device(None, None);
    (1..=3).for_each(|step| device.step(plan(step)).unwrap());
    // The first step of a session waited for nobody.
    assert_eq!(stepped(&mut events), (1, 500, 0));
    assert_eq!(stepped(&mut events), (2, 500, 7));
    watch.ended.store(true, Ordering::SeqCst);
    assert_eq!(stepped(&mut events), (3, 500, 7), "no further plan came");
    let asked = watch.asked.lock().unwrap().join(", ");
    assert_eq!(asked, "launch 1, launch 2, collect 1, launch 3, collect 2, collect 3");
}

#[test]
fn a_step_that_has_ended_is_collected_before_the_next_launch() {
    let (device, watch, mut events) = device(None, None);
    watch.ended.store(true, Ordering::SeqCst);
    (1..=2).for_each(|step| device.step(plan(step)).unwrap());
    assert_eq!([stepped(&mut events).0, stepped(&mut events).0], [1, 2]);
    assert_eq!(watch.asked.lock().unwrap().join(", "), "launch 1, collect 1, launch 2, collect 2");
}

#[test]
fn a_plan_that_must_wait_does_not_hold_an_output_back() {
    let (device, watch, mut events) = device(Some(2), None);
    (1..=2).for_each(|step| device.step(plan(step)).unwrap());
    assert_eq!(stepped(&mut events).0, 1);
    watch.ended.store(true, Ordering::SeqCst);
    assert_eq!(stepped(&mut events).0, 2);
    assert_eq!(watch.asked.lock().unwrap().join(", "), "launch 1, collect 1, launch 2, collect 2");
}

#[test]
fn a_reset_and_the_end_come_after_the_steps_under_way() {
    let (device, watch, mut events) = device(None, None);
    device.step(plan(1)).unwrap();
    device.reset().unwrap();
    device.step(plan(2)).unwrap();
    drop(device);
    assert_eq!(stepped(&mut events), (1, 500, 0));
    assert_eq!(stepped(&mut events), (2, 500, 0), "a new session");
    assert!(events.blocking_recv().is_none());
    assert_eq!(watch.asked.lock().unwrap().join(", "), "launch 1, collect 1, reset 0, launch 2, collect 2");
}

#[test]
fn a_fault_ends_the_thread() {
    let (device, _, mut events) = device(None, Some(2));
    (1..=2).for_each(|step| device.step(plan(step)).unwrap());
    assert!(matches!(events.blocking_recv(), Some(DeviceEvent::Died(why)) if why == "gone"));
    assert!(events.blocking_recv().is_none());
}
