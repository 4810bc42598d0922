//! Fair shares: how much each tenant has had, counted in tokens (virtual token counter, Sheng et al. 2024: a drawn token
//! weighs twice a prompt token). Must not know queues.

use std::collections::{BTreeMap, HashMap};

/// Weight of a drawn token; a prompt token weighs 1.
pub const DRAWN_WEIGHT: u64 = 2;

/// What one token adds to the account of a tenant of weight 1; a weight divides it.
const TOKEN: u64 = 1 << 20;

/// Records of tenants without work that are kept before all of them are forgotten.
const MOST_IDLE_RECORDS: usize = 4_096;

/// A tenant with work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(u32);

#[derive(Debug, Default)]
struct Record {
    served: u64,
    weight: u64,
    sequences: usize,
}

/// What tenants have had.
#[derive(Debug, Default)]
pub struct Shares {
    names: HashMap<String, TenantId>,
    records: HashMap<TenantId, Record>,
    weights: BTreeMap<String, u32>,
    active: usize,
    next: u32,
}

impl Shares {
    /// Nobody has had anything. Who is not among `weights` has weight 1.
    pub fn new(weights: BTreeMap<String, u32>) -> Self {
        Self { weights, ..Self::default() }
    }

    /// Counts a sequence of this tenant. Who comes back after a pause starts level with the least served tenant that has
    /// work: nobody saves up a share while idle.
    pub fn enter(&mut self, tenant: &str) -> TenantId {
        let floor = self.records.values().filter(|r| r.sequences > 0).map(|r| r.served).min();
        let id = match self.names.get(tenant) {
            Some(id) => *id,
            None => {
                self.forget_idle();
                self.next += 1;
                let id = TenantId(self.next);
                self.names.insert(tenant.to_owned(), id);
                id
            }
        };
        let weight = self.weights.get(tenant).map_or(1, |weight| u64::from(*weight).max(1));
        let record = self.records.entry(id).or_default();
        record.weight = weight;
        if record.sequences == 0 {
            record.served = record.served.max(floor.unwrap_or(0));
            self.active += 1;
        }
        record.sequences += 1;
        id
    }

    /// A sequence of this tenant ended.
    pub fn leave(&mut self, tenant: TenantId) {
        if let Some(record) = self.records.get_mut(&tenant) {
            record.sequences = record.sequences.saturating_sub(1);
            self.active -= usize::from(record.sequences == 0);
        }
    }

    /// Adds tokens (a drawn one counts [`DRAWN_WEIGHT`]) to what the tenant has had, divided by its weight.
    pub fn charge(&mut self, tenant: TenantId, tokens: u64) {
        if let Some(record) = self.records.get_mut(&tenant) {
            let more = tokens.saturating_mul(TOKEN) / record.weight.max(1);
            record.served = record.served.saturating_add(more);
        }
    }

    /// What the tenant has had, in an unknown unit: tenants compare by it.
    pub fn served(&self, tenant: TenantId) -> u64 {
        self.records.get(&tenant).map_or(0, |record| record.served)
    }

    fn forget_idle(&mut self) {
        if self.records.len() - self.active < MOST_IDLE_RECORDS {
            return;
        }
        self.records.retain(|_, record| record.sequences > 0);
        self.names.retain(|_, id| self.records.contains_key(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_saves_nothing_up() {
        let mut shares = Shares::default();
        let (a, b) = (shares.enter("a"), shares.enter("b"));
        shares.charge(a, 50);
        shares.leave(b);
        assert_eq!(shares.enter("b"), b);
        assert_eq!(shares.served(b), 50 * TOKEN);
        assert_eq!(shares.enter("a"), a);
        assert_eq!(shares.served(a), 50 * TOKEN, "who is ahead stays ahead");
    }

    #[test]
    fn a_weight_divides_what_is_charged() {
        let mut shares = Shares::new(BTreeMap::from([("gold".to_owned(), 4), ("none".to_owned(), 0)]));
        for (tenant, charged, served) in [("gold", 400, 100), ("plain", 100, 100), ("none", 7, 7)] {
            let id = shares.enter(tenant);
            let before = shares.served(id);
            shares.charge(id, charged);
            assert_eq!(shares.served(id) - before, served * TOKEN, "{tenant}");
            shares.leave(id);
        }
    }

    #[test]
    fn idle_records_are_bounded() {
        let mut shares = Shares::default();
        for n in 0..20_000 {
            let id = shares.enter(&format!("t{n}"));
            shares.leave(id);
        }
        assert!(shares.records.len() <= MOST_IDLE_RECORDS + 1 && shares.names.len() == shares.records.len());
    }
}
