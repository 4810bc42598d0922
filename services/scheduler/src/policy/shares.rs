//! Fair shares: how much each tenant has had, counted in tokens (virtual token counter, Sheng et al. 2024: a drawn token
//! weighs twice a prompt token). Must not know queues.

use std::collections::HashMap;

/// Weight of a drawn token; a prompt token weighs 1.
pub const DRAWN_WEIGHT: u64 = 2;

/// Records of tenants without work that are kept before all of them are forgotten.
const MOST_IDLE_RECORDS: usize = 4_096;

/// A tenant with work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(u32);

#[derive(Debug, Default)]
struct Record {
    served: u64,
    sequences: usize,
}

/// What tenants have had.
#[derive(Debug, Default)]
pub struct Shares {
    names: HashMap<String, TenantId>,
    records: HashMap<TenantId, Record>,
    active: usize,
    next: u32,
}

impl Shares {
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
        let record = self.records.entry(id).or_default();
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

    /// Adds weighted tokens to what the tenant has had.
    pub fn charge(&mut self, tenant: TenantId, weighted_tokens: u64) {
        if let Some(record) = self.records.get_mut(&tenant) {
            record.served = record.served.saturating_add(weighted_tokens);
        }
    }

    /// Weighted tokens the tenant has had.
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
        assert_eq!(shares.served(b), 50);
        assert_eq!(shares.enter("a"), a);
        assert_eq!(shares.served(a), 50, "who is ahead stays ahead");
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
