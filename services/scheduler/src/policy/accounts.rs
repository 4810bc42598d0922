//! What the policy says about itself: counts for metrics and beacons, and the proof that its books balance.
//! Must not change anything.

use std::collections::HashSet;

use millrace_protocol::prefix::PrefixSummary;
use serde::Serialize;

use super::blocks::Imbalance;
use super::planner::Planner;
use super::sequence::Phase;

/// Counts at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Sequences that wait.
    pub waiting: usize,
    /// Sequences that hold a slot.
    pub running: usize,
    /// Blocks nobody holds.
    pub free_blocks: usize,
    /// Blocks in the pool.
    pub total_blocks: usize,
    /// Blocks with reusable content.
    pub cached_blocks: usize,
    /// Plans whose outputs are out.
    pub outstanding: usize,
    /// Preemptions so far.
    pub preemptions: u64,
    /// Blocks copied to host memory so far, on this engine.
    pub swapped_out: u64,
    /// Blocks copied back so far, on this engine.
    pub swapped_in: u64,
    /// Sequences that can run at once on this engine.
    pub max_running: usize,
    /// Most tokens of one step on this engine.
    pub step_tokens: usize,
}

impl Planner {
    /// Counts for metrics and beacons.
    pub fn counts(&self) -> Counts {
        let engine = self.engine.as_ref();
        Counts {
            waiting: self.waiting.len(),
            running: self.running.len(),
            free_blocks: engine.map_or(0, |engine| engine.pool.available()),
            total_blocks: engine.map_or(0, |engine| engine.pool.total()),
            cached_blocks: engine.map_or(0, |engine| engine.pool.cached()),
            outstanding: self.outstanding.len(),
            preemptions: self.preemptions,
            swapped_out: engine.map_or(0, |engine| engine.swap.swapped().0),
            swapped_in: engine.map_or(0, |engine| engine.swap.swapped().1),
            max_running: engine.map_or(0, |engine| engine.max_running),
            step_tokens: engine.map_or(0, |engine| engine.step_tokens),
        }
    }

    /// What of which prompts is cached, for beacons.
    pub fn prefixes(&self) -> PrefixSummary {
        let pool = self.engine.as_ref().map(|engine| &engine.pool);
        pool.map(|pool| PrefixSummary::of(pool.cached(), pool.contents())).unwrap_or_default()
    }

    /// Proves that blocks, slots and sequences add up. Cheap enough for every idle moment, and for every step of a test.
    ///
    /// # Errors
    /// [`Imbalance`] names the first account that is wrong.
    pub fn check(&self) -> Result<(), Imbalance> {
        let wrong = |text: String| Err(Imbalance(text));
        let running = self.arena.iter().filter(|(_, s)| matches!(s.phase, Phase::Running(_))).count();
        if running != self.running.len() || running + self.waiting.len() != self.arena.len() {
            let (listed, waiting) = (self.running.len(), self.waiting.len());
            return wrong(format!("{} sequences: {running} run, {listed} listed, {waiting} wait", self.arena.len()));
        }
        if !self.running.is_sorted() {
            return wrong("running sequences are out of order".to_owned());
        }
        let Some(engine) = &self.engine else { return Ok(()) };
        let mut slots: HashSet<_> = engine.slots.iter().copied().collect();
        let mut tables = Vec::new();
        for (rank, id) in &self.running {
            let Some(sequence) = self.arena.get(*id) else { return wrong("an ended sequence runs".to_owned()) };
            let Some(part) = sequence.running() else { return wrong("a waiting sequence runs".to_owned()) };
            if sequence.rank != *rank || !slots.insert(part.slot) {
                return wrong(format!("slot {} of {} is held twice", part.slot.0, sequence.new.job));
            }
            if part.confirmed > part.planned || part.planned > part.table.len() * engine.block_tokens {
                return wrong(format!("{} planned beyond its blocks", sequence.new.job));
            }
            if sequence.answer().len() + part.in_flight > sequence.new.max_tokens as usize {
                return wrong(format!("{} planned beyond its answer", sequence.new.job));
            }
            // Whoever shares a block reads it: only full blocks may be shared, so no copy before a write is ever needed.
            let open_blocks = part.table.get(part.confirmed / engine.block_tokens..).unwrap_or_default();
            if let Some(block) = open_blocks.iter().find(|block| engine.pool.is_shared(block)) {
                return wrong(format!("block {} of {} is shared before it is full", block.id().0, sequence.new.job));
            }
            tables.extend(&part.table);
        }
        let idle = engine.under_way.owners().find(|id| self.arena.get(*id).is_none_or(|s| s.running().is_none()));
        if let Some(id) = idle {
            return wrong(format!("{id:?} is waited for, but does not run"));
        }
        let waiting = self.arena.iter().filter(|(_, sequence)| sequence.running().is_none());
        engine.swap.check(waiting.flat_map(|(_, sequence)| &sequence.chain.hashes()[..sequence.promised]))?;
        engine.pool.check(tables)
    }
}
