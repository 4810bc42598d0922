//! Sequences that wait: highest level first, within a level the tenant that has had least, within a tenant the oldest.
//! Every operation costs the logarithm of the number waiting; nothing walks the queue. Must not know blocks or budgets.
//!
//! Ageing: after each `ageing` of waiting a sequence rises one level, up to 9, so that every sequence is the first one
//! some day. Preemption compares a newcomer's own priority with the level, so an aged sequence keeps its place.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use millrace_protocol::job::MAX_PRIORITY;

use super::sequence::{Rank, SeqId};
use super::shares::{Shares, TenantId};

/// Place within a tenant: arrival, then order of arrival.
type Age = (Duration, u64);

#[derive(Debug, Clone, Copy)]
struct Entry {
    rank: Rank,
    tenant: TenantId,
    rises_at: Option<Duration>,
}

#[derive(Debug, Default)]
struct Level {
    tenants: HashMap<TenantId, BTreeMap<Age, SeqId>>,
    /// (had so far, its oldest, tenant).
    order: BTreeSet<(u64, Age, TenantId)>,
}

/// The waiting sequences.
#[derive(Debug)]
pub struct WaitingQueue {
    ageing: Duration,
    levels: [Level; MAX_PRIORITY as usize + 1],
    entries: HashMap<SeqId, Entry>,
    rises: BTreeSet<(Duration, SeqId)>,
    /// What tenants have had.
    shares: Shares,
}

impl WaitingQueue {
    /// An empty queue. An `ageing` of zero switches ageing off.
    pub fn new(ageing: Duration) -> Self {
        Self::with_weights(ageing, BTreeMap::new())
    }

    /// As [`Self::new`], with shares of tenants whose weight is not 1.
    pub fn with_weights(ageing: Duration, weights: BTreeMap<String, u32>) -> Self {
        Self {
            ageing,
            levels: Default::default(),
            entries: HashMap::new(),
            rises: BTreeSet::new(),
            shares: Shares::new(weights),
        }
    }

    /// Sequences that wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A sequence of this tenant enters the scheduler.
    pub fn enter(&mut self, tenant: &str) -> TenantId {
        self.shares.enter(tenant)
    }

    /// A sequence of this tenant leaves the scheduler.
    pub fn leave(&mut self, tenant: TenantId) {
        self.shares.leave(tenant);
    }

    /// Lets a sequence wait. `waited`: its earlier waits, which count for ageing.
    pub fn push(&mut self, id: SeqId, tenant: TenantId, rank: Rank, now: Duration, waited: Duration) {
        let entry = Entry { rank, tenant, rises_at: self.next_rise(rank, now, waited) };
        if let Some(at) = entry.rises_at {
            self.rises.insert((at, id));
        }
        self.entries.insert(id, entry);
        self.link(id, entry);
    }

    /// The sequence to admit next.
    pub fn head(&self) -> Option<SeqId> {
        let level = self.levels.iter().find(|level| !level.order.is_empty())?;
        let (_, age, tenant) = level.order.first()?;
        level.tenants.get(tenant)?.get(age).copied()
    }

    /// Rank of a waiting sequence, raised by ageing.
    pub fn rank(&self, id: SeqId) -> Option<Rank> {
        self.entries.get(&id).map(|entry| entry.rank)
    }

    /// Takes a sequence out; its rank as it is now.
    pub fn remove(&mut self, id: SeqId) -> Option<Rank> {
        let entry = self.entries.remove(&id)?;
        if let Some(at) = entry.rises_at {
            self.rises.remove(&(at, id));
        }
        self.unlink(entry);
        Some(entry.rank)
    }

    /// Raises every sequence whose time has come.
    pub fn age(&mut self, now: Duration) {
        while let Some(&(at, id)) = self.rises.first() {
            if at > now {
                return;
            }
            self.rises.pop_first();
            let Some(mut entry) = self.entries.get(&id).copied() else { continue };
            self.unlink(entry);
            entry.rank.depth -= 1;
            entry.rises_at = (entry.rank.depth > 0).then(|| at + self.ageing);
            if let Some(at) = entry.rises_at {
                self.rises.insert((at, id));
            }
            self.entries.insert(id, entry);
            self.link(id, entry);
        }
    }

    /// When the next sequence rises.
    pub fn next_rise_at(&self) -> Option<Duration> {
        self.rises.first().map(|(at, _)| *at)
    }

    /// Adds to what a tenant has had.
    pub fn charge(&mut self, tenant: TenantId, weighted_tokens: u64) {
        let before = self.shares.served(tenant);
        self.shares.charge(tenant, weighted_tokens);
        let after = self.shares.served(tenant);
        for level in &mut self.levels {
            if let Some((age, _)) = level.tenants.get(&tenant).and_then(BTreeMap::first_key_value) {
                let age = *age;
                level.order.remove(&(before, age, tenant));
                level.order.insert((after, age, tenant));
            }
        }
    }

    fn next_rise(&self, rank: Rank, now: Duration, waited: Duration) -> Option<Duration> {
        if self.ageing.is_zero() || rank.depth == 0 {
            return None;
        }
        let into_level = waited.as_nanos() % self.ageing.as_nanos();
        Some(now + self.ageing - Duration::from_nanos(u64::try_from(into_level).unwrap_or(0)))
    }

    fn link(&mut self, id: SeqId, entry: Entry) {
        let served = self.shares.served(entry.tenant);
        let age = (entry.rank.arrival, entry.rank.id);
        let level = &mut self.levels[entry.rank.depth as usize];
        let ages = level.tenants.entry(entry.tenant).or_default();
        if let Some((oldest, _)) = ages.first_key_value() {
            level.order.remove(&(served, *oldest, entry.tenant));
        }
        ages.insert(age, id);
        let oldest = ages.first_key_value().map_or(age, |(oldest, _)| *oldest);
        level.order.insert((served, oldest, entry.tenant));
    }

    fn unlink(&mut self, entry: Entry) {
        let served = self.shares.served(entry.tenant);
        let level = &mut self.levels[entry.rank.depth as usize];
        let Some(ages) = level.tenants.get_mut(&entry.tenant) else { return };
        if let Some((oldest, _)) = ages.first_key_value() {
            level.order.remove(&(served, *oldest, entry.tenant));
        }
        ages.remove(&(entry.rank.arrival, entry.rank.id));
        match ages.first_key_value() {
            Some((oldest, _)) => {
                level.order.insert((served, *oldest, entry.tenant));
            }
            None => {
                level.tenants.remove(&entry.tenant);
            }
        }
    }
}

/// Depth of a priority: 9 is depth 0.
pub fn depth(priority: u8) -> u8 {
    MAX_PRIORITY - priority.min(MAX_PRIORITY)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
