//! Which scheduler gets a job: the table of live schedulers, pure, and the choice among them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use millrace_protocol::engine::{BEACON_DEAD_AFTER_MS, SchedulerBeacon};
use millrace_protocol::{ActorId, ModelName};

/// Live schedulers by what they last said.
#[derive(Debug, Default)]
pub struct Schedulers {
    heard: HashMap<ActorId, (SchedulerBeacon, Instant)>,
}

impl Schedulers {
    /// Notes a beacon. Returns whether room appeared that was not there before.
    pub fn hear(&mut self, beacon: SchedulerBeacon, now: Instant) -> bool {
        let has_room = room(&beacon) > 0;
        let before = self.heard.insert(beacon.scheduler.clone(), (beacon, now));
        has_room && before.is_none_or(|(old, _)| room(&old) == 0)
    }

    /// The scheduler of `model` with the most room, and one place of that room taken until its next beacon.
    pub fn choose(&mut self, model: &ModelName, now: Instant) -> Option<ActorId> {
        let dead = Duration::from_millis(BEACON_DEAD_AFTER_MS);
        self.heard.retain(|_, (_, heard)| now.saturating_duration_since(*heard) < dead);
        let candidates = self.heard.values_mut().map(|(beacon, _)| beacon);
        let best = candidates
            .filter(|beacon| beacon.model == *model && room(beacon) > 0)
            .max_by_key(|beacon| (beacon.free_jobs, beacon.free_blocks))?;
        best.free_jobs -= 1;
        Some(best.scheduler.clone())
    }

    /// Takes a scheduler's room away until its next beacon: it said that it is busy, or did not answer.
    pub fn skip(&mut self, scheduler: &ActorId) {
        if let Some((beacon, _)) = self.heard.get_mut(scheduler) {
            beacon.free_jobs = 0;
        }
    }
}

fn room(beacon: &SchedulerBeacon) -> u32 {
    if beacon.draining || beacon.engine.is_none() { 0 } else { beacon.free_jobs }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::engine::EngineSpec;
    use millrace_runtime::Clock;

    use super::*;

    fn beacon(name: &str, model: &str, free_jobs: u32) -> SchedulerBeacon {
        let model = ModelName::new(model).unwrap();
        let engine = EngineSpec {
            model: model.clone(),
            weights_hash: String::new(),
            blocks: 1,
            block_tokens: 16,
            slots: 1,
            step_tokens: 1,
            step_patches: 1,
            max_tokens: 1,
            vocab: 1,
            device: "cpu".into(),
        };
        SchedulerBeacon {
            scheduler: ActorId::new(name).unwrap(),
            model,
            engine: Some(engine),
            free_jobs,
            waiting: 0,
            running: 0,
            free_blocks: 0,
            draining: false,
        }
    }

    #[test]
    fn the_roomiest_live_scheduler_of_the_model_is_chosen() {
        let (clock, hand) = Clock::manual(0);
        let mut table = Schedulers::default();
        let demo = ModelName::new("demo").unwrap();
        assert_eq!(table.choose(&demo, clock.now()), None);
        assert!(table.hear(beacon("a", "demo", 1), clock.now()));
        assert!(table.hear(beacon("b", "demo", 2), clock.now()));
        assert!(table.hear(beacon("c", "other", 9), clock.now()));
        let chosen: Vec<_> = (0..4).map(|_| table.choose(&demo, clock.now()).map(|id| id.to_string())).collect();
        assert_eq!(chosen.iter().flatten().filter(|id| *id == "b").count(), 2);
        assert_eq!((chosen.iter().flatten().count(), &chosen[3]), (3, &None));
        table.hear(beacon("a", "demo", 5), clock.now());
        hand.advance(Duration::from_millis(BEACON_DEAD_AFTER_MS));
        assert_eq!(table.choose(&demo, clock.now()), None, "a silent scheduler is dead");
    }

    #[test]
    fn busy_draining_and_engineless_schedulers_have_no_room() {
        let (clock, _) = Clock::manual(0);
        let mut table = Schedulers::default();
        let demo = ModelName::new("demo").unwrap();
        let draining = SchedulerBeacon { draining: true, ..beacon("a", "demo", 3) };
        let engineless = SchedulerBeacon { engine: None, ..beacon("b", "demo", 3) };
        assert!(!table.hear(draining, clock.now()) && !table.hear(engineless, clock.now()));
        assert_eq!(table.choose(&demo, clock.now()), None);
        assert!(table.hear(beacon("a", "demo", 3), clock.now()), "room appeared");
        assert!(!table.hear(beacon("a", "demo", 2), clock.now()), "it was there before");
        table.skip(&ActorId::new("a").unwrap());
        assert_eq!(table.choose(&demo, clock.now()), None);
    }
}
