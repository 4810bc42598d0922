//! Which scheduler gets a job: the table of live schedulers, pure, and the choice among them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use millrace_protocol::engine::{BEACON_DEAD_AFTER_MS, EngineSpec, SchedulerBeacon};
use millrace_protocol::prefix::HashChain;
use millrace_protocol::ready::ReadyJob;
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

    /// The scheduler of `model` that should get a job whose prompt each has `cached_tokens` of; one place of its room is
    /// taken until its next beacon. Load goes first: see [`prefer`].
    pub fn choose(
        &mut self,
        model: &ModelName,
        mut cached_tokens: impl FnMut(&SchedulerBeacon) -> usize,
        now: Instant,
    ) -> Option<ActorId> {
        let dead = Duration::from_millis(BEACON_DEAD_AFTER_MS);
        self.heard.retain(|_, (_, heard)| now.saturating_duration_since(*heard) < dead);
        let candidates = self.heard.values().map(|(beacon, _)| beacon);
        let candidates: Vec<_> = candidates
            .filter(|beacon| beacon.model == *model && room(beacon) > 0)
            .map(|beacon| (beacon, cached_tokens(beacon)))
            .collect();
        let best = prefer(&candidates)?.scheduler.clone();
        if let Some((beacon, _)) = self.heard.get_mut(&best) {
            beacon.free_jobs -= 1;
        }
        Some(best)
    }

    /// Takes a scheduler's room away until its next beacon: it said that it is busy, or did not answer.
    pub fn skip(&mut self, scheduler: &ActorId) {
        if let Some((beacon, _)) = self.heard.get_mut(scheduler) {
            beacon.free_jobs = 0;
        }
    }
}

/// The one with the longest cached beginning among those whose load allows it: nothing waits there, or it has at least half
/// the room of the roomiest. Without any, the roomiest.
fn prefer<'b>(candidates: &[(&'b SchedulerBeacon, usize)]) -> Option<&'b SchedulerBeacon> {
    let room = |beacon: &SchedulerBeacon| (beacon.free_jobs, beacon.free_blocks);
    let (roomiest, _) = candidates.iter().max_by_key(|(beacon, _)| room(beacon))?;
    let allowed = |beacon: &SchedulerBeacon| beacon.waiting == 0 || beacon.free_jobs >= roomiest.free_jobs.div_ceil(2);
    let warm = candidates.iter().filter(|(beacon, cached)| *cached > 0 && allowed(beacon));
    let best = warm.max_by_key(|(beacon, cached)| (*cached, room(beacon)));
    best.map(|(beacon, _)| *beacon).or(Some(*roomiest))
}

/// A prompt's content keys, as engines of different weights and block sizes have them.
#[derive(Debug)]
pub struct PromptKeys<'j> {
    job: &'j ReadyJob,
    chains: Vec<(String, u32, HashChain)>,
}

impl<'j> PromptKeys<'j> {
    /// Keys are computed when a scheduler is first asked about.
    pub fn new(job: &'j ReadyJob) -> Self {
        Self { job, chains: Vec::new() }
    }

    /// Leading tokens of the prompt that this scheduler has in its cache, as far as its summary tells.
    pub fn cached_tokens(&mut self, beacon: &SchedulerBeacon) -> usize {
        let Some(engine) = beacon.engine.as_ref().filter(|engine| engine.block_tokens > 0) else { return 0 };
        beacon.prefixes.leading(self.chain(engine).hashes()) * engine.block_tokens as usize
    }

    fn chain(&mut self, engine: &EngineSpec) -> &HashChain {
        let is_it = |(weights, tokens, _): &(String, u32, HashChain)| {
            *weights == engine.weights_hash && *tokens == engine.block_tokens
        };
        let place = self.chains.iter().position(is_it).unwrap_or_else(|| {
            let mut chain = HashChain::new(&engine.weights_hash, &self.job.tenant);
            chain.extend(&self.job.prompt, &self.job.media, engine.block_tokens as usize);
            self.chains.push((engine.weights_hash.clone(), engine.block_tokens, chain));
            self.chains.len() - 1
        });
        &self.chains[place].2
    }
}

fn room(beacon: &SchedulerBeacon) -> u32 {
    if beacon.draining || beacon.engine.is_none() { 0 } else { beacon.free_jobs }
}

#[cfg(test)]
mod tests {
    use millrace_protocol::prefix::PrefixSummary;
    use millrace_protocol::sampling::ResolvedSampling;
    use millrace_protocol::{Class, JobId};
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
            prefixes: PrefixSummary::default(),
            draining: false,
        }
    }

    #[test]
    fn the_roomiest_live_scheduler_of_the_model_is_chosen() {
        let (clock, hand) = Clock::manual(0);
        let mut table = Schedulers::default();
        let demo = ModelName::new("demo").unwrap();
        assert_eq!(table.choose(&demo, |_| 0, clock.now()), None);
        assert!(table.hear(beacon("a", "demo", 1), clock.now()));
        assert!(table.hear(beacon("b", "demo", 2), clock.now()));
        assert!(table.hear(beacon("c", "other", 9), clock.now()));
        let chosen: Vec<_> = (0..4).map(|_| table.choose(&demo, |_| 0, clock.now()).map(|id| id.to_string())).collect();
        assert_eq!(chosen.iter().flatten().filter(|id| *id == "b").count(), 2);
        assert_eq!((chosen.iter().flatten().count(), &chosen[3]), (3, &None));
        table.hear(beacon("a", "demo", 5), clock.now());
        hand.advance(Duration::from_millis(BEACON_DEAD_AFTER_MS));
        assert_eq!(table.choose(&demo, |_| 0, clock.now()), None, "a silent scheduler is dead");
    }

    #[test]
    fn a_cached_beginning_goes_before_room_but_not_before_load() {
        // Each: (name, free jobs, waiting, cached tokens); the one that should get the job.
        type Row = (&'static str, u32, u32, usize);
        let table: [(&[Row], Option<&str>); 8] = [
            (&[], None),
            (&[("a", 10, 0, 0), ("b", 20, 0, 0)], Some("b")),
            (&[("a", 10, 0, 16), ("b", 20, 0, 0)], Some("a")),
            (&[("a", 1, 0, 16), ("b", 20, 0, 0)], Some("a")),
            (&[("a", 9, 1, 160), ("b", 20, 0, 0)], Some("b")),
            (&[("a", 10, 1, 160), ("b", 20, 0, 0)], Some("a")),
            (&[("a", 10, 0, 16), ("b", 20, 0, 32)], Some("b")),
            (&[("a", 9, 5, 160), ("b", 20, 0, 0), ("c", 2, 0, 16)], Some("c")),
        ];
        for (rows, expected) in table {
            let beacons: Vec<_> = rows
                .iter()
                .map(|(name, free, waiting, cached)| {
                    (SchedulerBeacon { waiting: *waiting, ..beacon(name, "demo", *free) }, *cached)
                })
                .collect();
            let candidates: Vec<_> = beacons.iter().map(|(beacon, cached)| (beacon, *cached)).collect();
            assert_eq!(prefer(&candidates).map(|beacon| beacon.scheduler.as_str()), expected, "{rows:?}");
        }
    }

    #[test]
    fn a_prompt_is_known_by_its_tenant_weights_and_block_size() {
        let job = |tenant: &str, prompt: std::ops::Range<u32>| ReadyJob {
            job: JobId::new("j").unwrap(),
            model: ModelName::new("demo").unwrap(),
            class: Class::Batch,
            prompt: prompt.collect(),
            media: vec![],
            sampling: ResolvedSampling::greedy(),
            max_tokens: 1,
            stop: vec![],
            stop_token_ids: vec![],
            priority: 5,
            deadline_unix_ms: None,
            stream: false,
            tenant: tenant.into(),
            metadata_json: None,
            preprocess_ms: 0.0,
        };
        let mut chain = HashChain::new("w", "t");
        chain.extend(&(0..40).collect::<Vec<_>>(), &[], 16);
        let prefixes = PrefixSummary::of(chain.hashes().len(), chain.hashes());
        let mut warm = SchedulerBeacon { prefixes, ..beacon("a", "demo", 3) };
        warm.engine.as_mut().unwrap().weights_hash = "w".into();
        let cached = |job: &ReadyJob, beacon: &SchedulerBeacon| PromptKeys::new(job).cached_tokens(beacon);
        assert_eq!(cached(&job("t", 0..100), &warm), 32);
        assert_eq!(cached(&job("t", 0..17), &warm), 16);
        assert_eq!(cached(&job("other", 0..100), &warm), 0);
        assert_eq!(cached(&job("t", 1..100), &warm), 0);
        let mut keys = job("t", 0..100);
        assert_eq!(cached(&keys, &SchedulerBeacon { engine: None, ..warm.clone() }), 0);
        keys.tenant = "t".into();
        let mut shared = PromptKeys::new(&keys);
        let mut coarse = warm.clone();
        coarse.engine.as_mut().unwrap().block_tokens = 32;
        assert_eq!(
            (shared.cached_tokens(&warm), shared.cached_tokens(&coarse), shared.cached_tokens(&warm)),
            (32, 0, 32)
        );
    }

    #[test]
    fn busy_draining_and_engineless_schedulers_have_no_room() {
        let (clock, _) = Clock::manual(0);
        let mut table = Schedulers::default();
        let demo = ModelName::new("demo").unwrap();
        let draining = SchedulerBeacon { draining: true, ..beacon("a", "demo", 3) };
        let engineless = SchedulerBeacon { engine: None, ..beacon("b", "demo", 3) };
        assert!(!table.hear(draining, clock.now()) && !table.hear(engineless, clock.now()));
        assert_eq!(table.choose(&demo, |_| 0, clock.now()), None);
        assert!(table.hear(beacon("a", "demo", 3), clock.now()), "room appeared");
        assert!(!table.hear(beacon("a", "demo", 2), clock.now()), "it was there before");
        table.skip(&ActorId::new("a").unwrap());
        assert_eq!(table.choose(&demo, |_| 0, clock.now()), None);
    }
}
