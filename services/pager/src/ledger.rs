//! The books: which pages exist, in which tier, in what order of use, whose they are. Pure, no I/O; every
//! change keeps the sums equal to what the tables hold.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use bytes::Bytes;
use millrace_protocol::JobId;

/// What the pager did and holds; a snapshot for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PagerCounters {
    /// Bytes in RAM now.
    pub ram_bytes: u64,
    /// Bytes in spill files now, clean copies of RAM pages included.
    pub disk_bytes: u64,
    /// Pages held now.
    pub pages: u64,
    /// Jobs with a lease now.
    pub jobs: u64,
    /// Files written since start.
    pub spills: u64,
    /// Reads served from RAM since start.
    pub hits: u64,
    /// Reads that went to disk since start.
    pub misses: u64,
    /// Reads that found other bytes than were written, since start.
    pub corrupt: u64,
    /// Jobs whose lease ran out since start.
    pub expired: u64,
}

/// One page. At least one of `ram` and `on_disk` is set.
pub(crate) struct Entry {
    pub(crate) bytes: u64,
    pub(crate) hash: [u8; 16],
    pub(crate) ram: Option<Bytes>,
    pub(crate) on_disk: bool,
    /// Key in `by_use` while in RAM.
    used: u64,
}

struct Lease {
    until: Instant,
    pages: Vec<u64>,
}

#[derive(Default)]
pub(crate) struct Ledger {
    pages: HashMap<u64, Entry>,
    by_use: BTreeMap<u64, u64>,
    leases: HashMap<JobId, Lease>,
    next_page: u64,
    tick: u64,
    pub(crate) counters: PagerCounters,
}

impl Ledger {
    /// A number that no page had before.
    pub(crate) fn number(&mut self) -> u64 {
        self.next_page += 1;
        self.next_page
    }

    pub(crate) fn entry(&self, page: u64) -> Option<&Entry> {
        self.pages.get(&page)
    }

    /// Books a new page; exactly one of RAM and disk holds it.
    pub(crate) fn insert(
        &mut self,
        page: u64,
        job: &JobId,
        bytes: u64,
        hash: [u8; 16],
        ram: Option<Bytes>,
        until: Instant,
    ) {
        let on_disk = ram.is_none();
        self.pages.insert(page, Entry { bytes, hash, ram: None, on_disk, used: 0 });
        if on_disk {
            self.counters.disk_bytes += bytes;
        }
        if let Some(ram) = ram {
            self.enter_ram(page, ram);
        }
        let lease = self.leases.entry(job.clone()).or_insert(Lease { until, pages: Vec::new() });
        lease.until = lease.until.max(until);
        lease.pages.push(page);
    }

    /// The page used longest ago among those in RAM.
    pub(crate) fn oldest_in_ram(&self) -> Option<u64> {
        self.by_use.values().next().copied()
    }

    /// Marks a page in RAM as just used and returns its bytes.
    pub(crate) fn touch(&mut self, page: u64) -> Option<Bytes> {
        let entry = self.pages.get_mut(&page)?;
        let bytes = entry.ram.clone()?;
        self.tick += 1;
        self.by_use.remove(&entry.used);
        entry.used = self.tick;
        self.by_use.insert(self.tick, page);
        Some(bytes)
    }

    /// Books a page as in RAM.
    pub(crate) fn enter_ram(&mut self, page: u64, ram: Bytes) {
        self.tick += 1;
        let Some(entry) = self.pages.get_mut(&page) else { return };
        if entry.ram.is_none() {
            entry.ram = Some(ram);
            entry.used = self.tick;
            self.by_use.insert(self.tick, page);
            self.counters.ram_bytes += entry.bytes;
        }
    }

    /// Books a page as no longer in RAM.
    pub(crate) fn leave_ram(&mut self, page: u64) {
        let Some(entry) = self.pages.get_mut(&page) else { return };
        if entry.ram.take().is_some() {
            self.by_use.remove(&entry.used);
            self.counters.ram_bytes -= entry.bytes;
        }
    }

    /// Books a page's file as written (`true`) or removed (`false`).
    pub(crate) fn set_on_disk(&mut self, page: u64, on_disk: bool) {
        let Some(entry) = self.pages.get_mut(&page) else { return };
        if entry.on_disk != on_disk {
            entry.on_disk = on_disk;
            let bytes = entry.bytes;
            if on_disk {
                self.counters.disk_bytes += bytes;
            } else {
                self.counters.disk_bytes -= bytes;
            }
        }
    }

    /// A page that is in both tiers: its file can go without loss. Never `except`, which is on its way out of RAM.
    pub(crate) fn clean_copy(&self, except: u64) -> Option<u64> {
        let in_ram = self.by_use.values().copied().filter(|&page| page != except);
        in_ram.into_iter().find(|page| self.pages.get(page).is_some_and(|entry| entry.on_disk))
    }

    /// Extends the leases of those jobs that are known; returns how many.
    pub(crate) fn renew(&mut self, jobs: &[JobId], until: Instant) -> usize {
        let mut known = 0;
        for job in jobs {
            if let Some(lease) = self.leases.get_mut(job) {
                lease.until = lease.until.max(until);
                known += 1;
            }
        }
        known
    }

    /// Forgets a job; returns its pages that have files, and how many pages it had.
    pub(crate) fn release(&mut self, job: &JobId) -> (Vec<u64>, usize) {
        let Some(lease) = self.leases.remove(job) else { return (Vec::new(), 0) };
        let mut files = Vec::new();
        for &page in &lease.pages {
            self.leave_ram(page);
            if self.pages.get(&page).is_some_and(|entry| entry.on_disk) {
                files.push(page);
                self.set_on_disk(page, false);
            }
            self.pages.remove(&page);
        }
        (files, lease.pages.len())
    }

    /// Jobs whose lease ended at or before `now`.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<JobId> {
        self.leases.iter().filter(|(_, lease)| lease.until <= now).map(|(job, _)| job.clone()).collect()
    }

    pub(crate) fn snapshot(&self) -> PagerCounters {
        PagerCounters { pages: self.pages.len() as u64, jobs: self.leases.len() as u64, ..self.counters }
    }
}
