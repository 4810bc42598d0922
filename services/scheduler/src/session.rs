//! The hold on one executor: which ones live, which one is held, which steps are out. State only; the actor sends.
//! Must not know sequences.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use millrace_protocol::ActorId;
use millrace_protocol::engine::{BEACON_DEAD_AFTER_MS, EngineSpec, ExecutorBeacon};
use millrace_protocol::step::StepOutput;

/// Silence after which an executor counts as dead.
pub const DEAD_AFTER: Duration = Duration::from_millis(BEACON_DEAD_AFTER_MS);

/// A refused or unanswered request for an executor is repeated after this.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(300);

/// The hold is renewed this often.
const RENEW_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Seen {
    at: Duration,
    blocks: u32,
    attached_to: Option<ActorId>,
    asked_at: Option<Duration>,
    /// Requests since its last answer, and one if a session with it was lost: others are asked first.
    in_vain: u32,
}

/// A plan that was sent this long before the executor said what it has is lost if it is not among that.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// The executor held.
#[derive(Debug)]
pub struct Attached {
    /// Who.
    pub executor: ActorId,
    /// Session number.
    pub session: u64,
    /// What its engine can do.
    pub spec: EngineSpec,
    next_step: u64,
    /// (step, when it was sent, tokens in it) of the plans that are out.
    sent: VecDeque<(u64, Duration, usize)>,
    renewed_at: Duration,
    /// When the executor last answered a renewal.
    heard_at: Duration,
    /// A step whose output had left, but not arrived, when the executor last answered.
    missing: Option<u64>,
}

/// What an output means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It answers the oldest plan that is out; the number of tokens it computed.
    Due {
        /// Tokens of the plan.
        tokens: usize,
    },
    /// It belongs to another session, or was seen already.
    Ignore,
    /// The session is of no use any more.
    Broken(String),
}

/// Executors of one model, and the hold on one of them.
#[derive(Debug, Default)]
pub struct Executors {
    seen: HashMap<ActorId, Seen>,
    /// Asked, not answered yet.
    pub asking: Option<ActorId>,
    /// Held.
    pub attached: Option<Attached>,
}

impl Executors {
    /// Notes a sign of life.
    pub fn observe(&mut self, beacon: &ExecutorBeacon, now: Duration) {
        let before = self.seen.get(&beacon.executor);
        let (asked_at, in_vain) = before.map_or((None, 0), |seen| (seen.asked_at, seen.in_vain));
        let attached_to = beacon.attached_to.clone();
        let seen = Seen { at: now, blocks: beacon.spec.blocks, attached_to, asked_at, in_vain };
        self.seen.insert(beacon.executor.clone(), seen);
    }

    /// The executor to ask next, if one is wanted: a living one that nobody else holds, with the most room. It counts as
    /// asked from now on.
    pub fn ask(&mut self, me: &ActorId, now: Duration) -> Option<ActorId> {
        if self.attached.is_some() || self.asking.is_some() {
            return None;
        }
        self.seen.retain(|_, seen| now.saturating_sub(seen.at) < DEAD_AFTER * 4);
        let askable = |seen: &Seen| {
            now.saturating_sub(seen.at) < DEAD_AFTER
                && seen.attached_to.as_ref().is_none_or(|holder| holder == me)
                && seen.asked_at.is_none_or(|at| now.saturating_sub(at) >= ASK_AGAIN_AFTER)
        };
        let best = self.seen.iter_mut().filter(|(_, seen)| askable(seen));
        let (executor, seen) =
            best.max_by(|(a, x), (b, y)| (y.in_vain, x.blocks, *b).cmp(&(x.in_vain, y.blocks, *a)))?;
        seen.asked_at = Some(now);
        seen.in_vain += 1;
        self.asking = Some(executor.clone());
        self.asking.clone()
    }

    /// The executor answered a request.
    pub fn replied(&mut self, executor: &ActorId) {
        if let Some(seen) = self.seen.get_mut(executor) {
            seen.in_vain = 0;
        }
    }

    /// The executor said that another scheduler holds it.
    pub fn held_by(&mut self, executor: &ActorId, by: ActorId) {
        if let Some(seen) = self.seen.get_mut(executor) {
            seen.attached_to = Some(by);
        }
    }

    /// A new session begins.
    pub fn attach(&mut self, executor: ActorId, session: u64, spec: EngineSpec, now: Duration) {
        self.asking = None;
        self.attached = Some(Attached {
            executor,
            session,
            spec,
            next_step: 1,
            sent: VecDeque::new(),
            renewed_at: now,
            heard_at: now,
            missing: None,
        });
    }

    /// Ends the session on this side.
    pub fn lose(&mut self) -> Option<Attached> {
        let lost = self.attached.take()?;
        // It may be asked again at once: a broken session says nothing against the executor.
        if let Some(seen) = self.seen.get_mut(&lost.executor) {
            (seen.asked_at, seen.attached_to, seen.in_vain) = (None, None, 1);
        }
        Some(lost)
    }

    /// Whether it is time to renew the hold: the executor and the session.
    pub fn renewal(&mut self, now: Duration) -> Option<(ActorId, u64)> {
        let attached = self.attached.as_mut()?;
        if now.saturating_sub(attached.renewed_at) < RENEW_EVERY {
            return None;
        }
        attached.renewed_at = now;
        Some((attached.executor.clone(), attached.session))
    }

    /// Why the session has to be given up now, if it has to.
    pub fn overdue(&self, now: Duration, step_timeout: Duration) -> Option<String> {
        let attached = self.attached.as_ref()?;
        let silent = self.seen.get(&attached.executor).map(|seen| now.saturating_sub(seen.at));
        if silent.is_none_or(|silent| silent >= DEAD_AFTER) {
            return Some(format!("executor {} fell silent", attached.executor));
        }
        if now.saturating_sub(attached.heard_at) >= DEAD_AFTER {
            return Some(format!("executor {} beats but does not answer", attached.executor));
        }
        let (step, at, _) = attached.sent.front()?;
        let waited = now.saturating_sub(*at);
        (waited >= step_timeout).then(|| format!("step {step} gave no output for {} s", waited.as_secs()))
    }

    /// Number of executors that live.
    pub fn living(&self, now: Duration) -> usize {
        self.seen.values().filter(|seen| now.saturating_sub(seen.at) < DEAD_AFTER).count()
    }
}

impl Attached {
    /// Numbers a plan that is about to be sent.
    pub fn number(&mut self, tokens: usize, now: Duration) -> u64 {
        let step = self.next_step;
        self.next_step += 1;
        self.sent.push_back((step, now, tokens));
        step
    }

    /// The executor answered a renewal that was asked at `asked_at`: the last plan that it has, and the last step whose
    /// output it sent. A message that is lost between the two sides shows here, and nowhere else if it was the last one.
    pub fn renewed(
        &mut self,
        heard_step: u64,
        answered_step: u64,
        asked_at: Duration,
        now: Duration,
    ) -> Result<(), String> {
        self.heard_at = now;
        let due = |(step, at, _): &&(u64, Duration, usize)| *step > heard_step && *at + LOST_AFTER <= asked_at;
        if let Some((step, ..)) = self.sent.iter().find(due) {
            return Err(format!("the plan of step {step} was lost"));
        }
        // The output may still be on its way when the answer overtakes it: it is lost if that was so the last time, too.
        let missing = self.sent.front().map(|(step, ..)| *step).filter(|step| *step <= answered_step);
        match (std::mem::replace(&mut self.missing, missing), missing) {
            (Some(before), Some(still)) if before == still => Err(format!("the output of step {still} was lost")),
            _ => Ok(()),
        }
    }

    /// Judges an output.
    pub fn judge(&mut self, output: &StepOutput) -> Answer {
        if output.executor != self.executor || output.session != self.session {
            return Answer::Ignore;
        }
        if let Some(reason) = &output.broken {
            return Answer::Broken(reason.clone());
        }
        match self.sent.front() {
            Some((due, _, tokens)) if *due == output.step => {
                let tokens = *tokens;
                self.sent.pop_front();
                Answer::Due { tokens }
            }
            Some((due, ..)) if output.step > *due => {
                Answer::Broken(format!("output of step {} came, that of step {due} was due", output.step))
            }
            _ if output.step < self.next_step => Answer::Ignore,
            _ => Answer::Broken(format!("output of step {}, which was never planned", output.step)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_protocol::ModelName;

    fn id(text: &str) -> ActorId {
        ActorId::new(text).unwrap()
    }

    fn spec(blocks: u32) -> EngineSpec {
        EngineSpec {
            model: ModelName::new("m").unwrap(),
            weights_hash: String::new(),
            blocks,
            block_tokens: 16,
            slots: 4,
            step_tokens: 64,
            step_patches: 64,
            max_tokens: 100,
            vocab: 10,
            device: String::new(),
        }
    }

    fn beacon(name: &str, blocks: u32, holder: Option<&str>) -> ExecutorBeacon {
        ExecutorBeacon { executor: id(name), spec: spec(blocks), attached_to: holder.map(id), steps: 0 }
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn output(executor: &str, session: u64, step: u64) -> StepOutput {
        let executor = id(executor);
        StepOutput { executor, session, step, tokens: vec![], failed: vec![], broken: None, busy_us: 0, idle_us: 0 }
    }

    #[test]
    fn the_largest_free_living_executor_is_asked_once_at_a_time() {
        let mut executors = Executors::default();
        assert_eq!(executors.ask(&id("me"), ms(0)), None);
        executors.observe(&beacon("small", 10, None), ms(0));
        executors.observe(&beacon("large", 30, Some("other")), ms(0));
        executors.observe(&beacon("middle", 20, None), ms(0));
        assert_eq!(executors.ask(&id("me"), ms(0)), Some(id("middle")));
        assert_eq!(executors.ask(&id("me"), ms(0)), None);
        executors.asking = None;
        executors.held_by(&id("middle"), id("other"));
        assert_eq!(executors.ask(&id("me"), ms(1)), Some(id("small")));
        executors.asking = None;
        assert_eq!(executors.ask(&id("me"), ms(2)), None, "asked just now");
        executors.observe(&beacon("small", 10, None), ms(400));
        assert_eq!(executors.ask(&id("me"), ms(400)), Some(id("small")));
        assert_eq!(executors.living(ms(1_600)), 1);
    }

    #[test]
    fn one_that_does_not_answer_comes_last() {
        let mut executors = Executors::default();
        let asked = |executors: &mut Executors, at: u64| {
            for (name, blocks) in [("deaf", 30), ("small", 10)] {
                executors.observe(&beacon(name, blocks, None), ms(at));
            }
            executors.asking = None;
            executors.ask(&id("me"), ms(at)).unwrap().to_string()
        };
        assert_eq!(asked(&mut executors, 0), "deaf");
        assert_eq!(asked(&mut executors, 1_000), "small", "the other one has not answered");
        executors.replied(&id("small"));
        assert_eq!(asked(&mut executors, 2_000), "small");
        executors.replied(&id("deaf"));
        assert_eq!(asked(&mut executors, 3_000), "deaf");
    }

    #[test]
    fn silence_and_late_steps_end_a_session() {
        let mut executors = Executors::default();
        executors.observe(&beacon("x", 10, None), ms(0));
        executors.attach(id("x"), 7, spec(10), ms(0));
        assert_eq!(executors.overdue(ms(1_499), ms(5_000)), None);
        assert!(executors.overdue(ms(1_500), ms(5_000)).unwrap().contains("silent"));
        executors.attached.as_mut().unwrap().number(3, ms(100));
        executors.observe(&beacon("x", 10, Some("me")), ms(5_000));
        assert!(executors.overdue(ms(5_000), ms(5_000)).unwrap().contains("does not answer"));
        assert_eq!(executors.attached.as_mut().unwrap().renewed(1, 0, ms(4_990), ms(5_000)), Ok(()));
        assert_eq!(executors.overdue(ms(5_099), ms(5_000)), None);
        assert!(executors.overdue(ms(5_100), ms(5_000)).unwrap().contains("step 1"));
        assert_eq!(executors.renewal(ms(5_100)), Some((id("x"), 7)));
        assert_eq!(executors.renewal(ms(5_200)), None);
        executors.lose();
        assert_eq!(executors.ask(&id("me"), ms(5_200)), Some(id("x")), "may be asked at once");
    }

    #[test]
    fn a_message_that_is_lost_last_is_found_by_the_renewals() {
        let attached = |plans: usize| {
            let mut executors = Executors::default();
            executors.attach(id("x"), 7, spec(10), ms(0));
            let mut attached = executors.attached.unwrap();
            for _ in 0..plans {
                attached.number(1, ms(100));
            }
            attached
        };
        // (plans sent at 100 ms, [(heard, answered, asked at)], what is lost)
        type Case = (usize, &'static [(u64, u64, u64)], Option<&'static str>);
        let cases: [Case; 6] = [
            (2, &[(2, 0, 600), (2, 0, 1_100), (2, 0, 9_000)], None),
            (2, &[(1, 0, 600), (1, 0, 1_099)], None),
            (2, &[(1, 0, 1_100)], Some("the plan of step 2 was lost")),
            (2, &[(2, 1, 600)], None),
            (2, &[(2, 1, 600), (2, 1, 1_100)], Some("the output of step 1 was lost")),
            (0, &[(0, 0, 9_000), (0, 0, 9_500)], None),
        ];
        for (plans, answers, lost) in cases {
            let mut attached = attached(plans);
            let verdicts =
                answers.iter().map(|(heard, answered, at)| attached.renewed(*heard, *answered, ms(*at), ms(*at)));
            assert_eq!(verdicts.last().unwrap().err().as_deref(), lost, "{answers:?}");
        }
        // An output that came late is no loss, and the next one is judged for itself.
        let mut attached = attached(2);
        assert_eq!(attached.renewed(2, 1, ms(600), ms(600)), Ok(()));
        assert_eq!(attached.judge(&output("x", 7, 1)), Answer::Due { tokens: 1 });
        assert_eq!(attached.renewed(2, 2, ms(1_100), ms(1_100)), Ok(()));
    }

    #[test]
    fn lost_and_foreign_outputs_are_told_apart() {
        let mut executors = Executors::default();
        executors.attach(id("x"), 7, spec(10), ms(0));
        let attached = executors.attached.as_mut().unwrap();
        for tokens in 1..=3 {
            assert_eq!(attached.number(tokens, ms(0)), tokens as u64);
        }
        assert_eq!(attached.judge(&output("x", 6, 1)), Answer::Ignore);
        assert_eq!(attached.judge(&output("y", 7, 1)), Answer::Ignore);
        assert_eq!(attached.judge(&output("x", 7, 1)), Answer::Due { tokens: 1 });
        assert_eq!(attached.judge(&output("x", 7, 1)), Answer::Ignore, "a duplicate");
        assert!(matches!(attached.judge(&output("x", 7, 3)), Answer::Broken(_)), "a gap");
        assert!(matches!(attached.judge(&output("x", 7, 9)), Answer::Broken(_)), "never planned");
        let broken = StepOutput { broken: Some("why".into()), ..output("x", 7, 2) };
        assert_eq!(attached.judge(&broken), Answer::Broken("why".into()));
    }
}
