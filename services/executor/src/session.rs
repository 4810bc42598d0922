//! Which scheduler holds this executor: pure state, so that exclusivity and step order are tested without NATS.

use std::time::{Duration, Instant};

use millrace_protocol::ActorId;
use millrace_protocol::plan::StepPlan;

/// A holder that is silent for this long loses the executor to the next one that asks.
pub const HOLD: Duration = Duration::from_secs(3);

/// The present holder.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    scheduler: ActorId,
    session: u64,
    next_step: u64,
    answered_step: u64,
    heard: Instant,
}

/// Answer to a scheduler that asks for the executor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Granted {
    /// A new session: every slot must be forgotten first.
    New(u64),
    /// The session goes on.
    Renewed(u64),
    /// Another scheduler holds it.
    HeldBy(ActorId),
    /// The asker's session is over.
    Lost,
}

/// What to do with a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Run it.
    Run,
    /// Not of this session: a leftover, to be ignored.
    Ignore,
    /// A plan was lost or repeated; the session is over.
    Broken(String),
}

/// Holder and step order of one executor.
#[derive(Debug, Default)]
pub struct Session {
    held: Option<Held>,
    last_session: u64,
}

impl Session {
    /// Starts with no holder. Session numbers continue above `floor` (the start time), so that no incarnation of an
    /// executor ever reuses one.
    pub fn new(floor: u64) -> Self {
        Self { held: None, last_session: floor }
    }

    /// The present holder.
    pub fn holder(&self) -> Option<&ActorId> {
        self.held.as_ref().map(|held| &held.scheduler)
    }

    /// The present session number.
    pub fn number(&self) -> Option<u64> {
        self.held.as_ref().map(|held| held.session)
    }

    /// A scheduler asks to take (`session` is `None`) or to keep the executor.
    pub fn attach(&mut self, scheduler: &ActorId, session: Option<u64>, now: Instant) -> Granted {
        if let Some(wanted) = session {
            return match &mut self.held {
                Some(held) if held.scheduler == *scheduler && held.session == wanted => {
                    held.heard = now;
                    Granted::Renewed(wanted)
                }
                _ => Granted::Lost,
            };
        }
        if let Some(held) = &self.held {
            let fresh = now.saturating_duration_since(held.heard) < HOLD;
            if fresh && held.scheduler != *scheduler {
                return Granted::HeldBy(held.scheduler.clone());
            }
        }
        self.last_session += 1;
        let session = self.last_session;
        self.held = Some(Held { scheduler: scheduler.clone(), session, next_step: 1, answered_step: 0, heard: now });
        Granted::New(session)
    }

    /// Last plan that arrived and last step whose output left: the holder finds lost messages by them.
    pub fn progress(&self) -> (u64, u64) {
        self.held.as_ref().map_or((0, 0), |held| (held.next_step - 1, held.answered_step))
    }

    /// The output of a step is on its way.
    pub fn answered(&mut self, session: u64, step: u64) {
        if let Some(held) = self.held.as_mut().filter(|held| held.session == session) {
            held.answered_step = step;
        }
    }

    /// The holder gives the executor back; others are ignored.
    pub fn detach(&mut self, scheduler: &ActorId) {
        if self.holder() == Some(scheduler) {
            self.held = None;
        }
    }

    /// Ends the session of a holder that fell silent, so that beacons say at once that the executor is free.
    pub fn expire(&mut self, now: Instant) {
        if self.held.as_ref().is_some_and(|held| now.saturating_duration_since(held.heard) >= HOLD) {
            self.held = None;
        }
    }

    /// Ends the session after a fault.
    pub fn end(&mut self) {
        self.held = None;
    }

    /// Judges a plan and counts its step.
    pub fn admit(&mut self, plan: &StepPlan, now: Instant) -> Verdict {
        let Some(held) = &mut self.held else { return Verdict::Ignore };
        if plan.session != held.session || plan.scheduler != held.scheduler {
            return Verdict::Ignore;
        }
        held.heard = now;
        if plan.step != held.next_step {
            return Verdict::Broken(format!("step {} arrived, step {} was due", plan.step, held.next_step));
        }
        held.next_step += 1;
        Verdict::Run
    }
}

#[cfg(test)]
mod tests {
    use millrace_runtime::Clock;

    use super::*;

    fn id(text: &str) -> ActorId {
        ActorId::new(text).unwrap()
    }

    fn plan(scheduler: &str, session: u64, step: u64) -> StepPlan {
        StepPlan {
            scheduler: id(scheduler),
            session,
            step,
            release: vec![],
            copies: vec![],
            open: vec![],
            work: vec![],
        }
    }

    #[test]
    fn one_scheduler_holds_it_until_it_falls_silent() {
        let (clock, hand) = Clock::manual(0);
        let mut session = Session::new(100);
        assert_eq!(session.attach(&id("a"), None, clock.now()), Granted::New(101));
        assert_eq!(session.attach(&id("b"), None, clock.now()), Granted::HeldBy(id("a")));
        hand.advance(HOLD / 2);
        assert_eq!(session.attach(&id("a"), Some(101), clock.now()), Granted::Renewed(101));
        hand.advance(HOLD / 2);
        assert_eq!(session.attach(&id("b"), None, clock.now()), Granted::HeldBy(id("a")));
        session.expire(clock.now());
        assert_eq!(session.holder(), Some(&id("a")));
        hand.advance(HOLD);
        session.expire(clock.now());
        assert_eq!(session.holder(), None, "free for everyone to see");
        assert_eq!(session.attach(&id("b"), None, clock.now()), Granted::New(102));
        assert_eq!(session.attach(&id("a"), Some(101), clock.now()), Granted::Lost);
    }

    #[test]
    fn steps_run_in_order_and_only_in_their_session() {
        let (clock, _) = Clock::manual(0);
        let mut session = Session::new(0);
        assert_eq!(session.admit(&plan("a", 1, 1), clock.now()), Verdict::Ignore);
        session.attach(&id("a"), None, clock.now());
        assert_eq!(session.admit(&plan("a", 1, 1), clock.now()), Verdict::Run);
        assert_eq!(session.admit(&plan("b", 1, 2), clock.now()), Verdict::Ignore);
        assert_eq!(session.admit(&plan("a", 7, 2), clock.now()), Verdict::Ignore);
        assert_eq!(session.admit(&plan("a", 1, 2), clock.now()), Verdict::Run);
        assert!(matches!(session.admit(&plan("a", 1, 2), clock.now()), Verdict::Broken(_)));
        assert!(matches!(session.admit(&plan("a", 1, 4), clock.now()), Verdict::Broken(_)));
    }

    #[test]
    fn progress_is_that_of_the_present_session() {
        let (clock, _) = Clock::manual(0);
        let mut session = Session::new(0);
        assert_eq!(session.progress(), (0, 0));
        session.attach(&id("a"), None, clock.now());
        for step in 1..=2 {
            session.admit(&plan("a", 1, step), clock.now());
        }
        session.answered(1, 1);
        assert_eq!(session.progress(), (2, 1));
        session.attach(&id("a"), None, clock.now());
        session.answered(1, 2);
        assert_eq!(session.progress(), (0, 0), "an output of the session before");
    }

    #[test]
    fn a_new_session_of_the_same_scheduler_starts_over() {
        let (clock, _) = Clock::manual(0);
        let mut session = Session::new(0);
        session.attach(&id("a"), None, clock.now());
        assert_eq!(session.admit(&plan("a", 1, 1), clock.now()), Verdict::Run);
        assert_eq!(session.attach(&id("a"), None, clock.now()), Granted::New(2));
        assert_eq!(session.admit(&plan("a", 1, 2), clock.now()), Verdict::Ignore);
        assert_eq!(session.admit(&plan("a", 2, 1), clock.now()), Verdict::Run);
        session.detach(&id("b"));
        assert_eq!(session.holder(), Some(&id("a")));
        session.detach(&id("a"));
        assert_eq!(session.holder(), None);
    }
}
