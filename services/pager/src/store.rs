//! The page store: RAM first, files beyond it, budgets never exceeded.
//!
//! One mutex guards the books. Files are written under it (so that a budget is never promised twice) and read
//! outside it. Content never changes, so a page that was spilled once keeps its file when it returns to RAM and
//! costs nothing to evict again; such clean copies go first when the disk budget is short.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use millrace_protocol::{ActorId, JobId, PageDtype, PageRef};

use crate::error::PagerError;
use crate::ledger::{Ledger, PagerCounters};
use crate::spill::{self, SpillDir};

/// Where pages may be and how much of them.
#[derive(Debug, Clone)]
pub struct PagerLimits {
    /// Most bytes in RAM.
    pub ram_bytes: u64,
    /// Most bytes in spill files; 0 switches spilling off.
    pub disk_bytes: u64,
    /// Folder under which this process makes its own.
    pub spill_root: PathBuf,
    /// A job's pages are freed when nobody renewed its lease for this long.
    pub lease: Duration,
}

/// Holds pages. Share it in an `Arc`; every method takes `&self`.
pub struct PageStore {
    node: ActorId,
    limits: PagerLimits,
    spill: SpillDir,
    ledger: Mutex<Ledger>,
}

impl PageStore {
    /// Opens a store and removes spill folders that dead processes left behind.
    ///
    /// # Errors
    /// [`PagerError::Io`] if the spill folder cannot be made.
    pub fn open(node: ActorId, limits: PagerLimits) -> Result<Self, PagerError> {
        let spill = SpillDir::create(&limits.spill_root)?;
        Ok(Self { node, limits, spill, ledger: Mutex::new(Ledger::default()) })
    }

    /// Stores a page under `job`'s lease, which runs from `now` (again).
    ///
    /// # Errors
    /// [`PagerError::OverBudget`] if neither tier has room, [`PagerError::Shape`] if `bytes` is not of that shape,
    /// [`PagerError::Io`] if spilling failed. Nothing is stored then.
    pub fn put(
        &self,
        job: &JobId,
        dtype: PageDtype,
        shape: &[u32],
        bytes: Bytes,
        now: Instant,
    ) -> Result<PageRef, PagerError> {
        let length = bytes.len() as u64;
        let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(u64::from(size)));
        let expected = elements.and_then(|n| n.checked_mul(dtype.size_bytes() as u64)).unwrap_or(u64::MAX);
        if expected != length {
            return Err(PagerError::Shape { shape: shape.to_vec(), expected, actual: length });
        }
        let hash = spill::checksum(&bytes);
        let mut ledger = self.lock();
        let page = ledger.number();
        let until = now + self.limits.lease;
        if self.make_ram_room(&mut ledger, length)? {
            ledger.insert(page, job, length, hash, Some(bytes), until);
        } else if self.make_disk_room(&mut ledger, length, page) {
            self.spill.write(page, &bytes)?;
            ledger.counters.spills += 1;
            ledger.insert(page, job, length, hash, None, until);
        } else {
            let counters = ledger.counters;
            return Err(PagerError::OverBudget {
                page_bytes: length,
                ram_free: self.limits.ram_bytes - counters.ram_bytes,
                disk_free: self.limits.disk_bytes - counters.disk_bytes,
            });
        }
        Ok(PageRef { node: self.node.clone(), page, dtype, shape: shape.to_vec(), bytes: length, hash })
    }

    /// A page's bytes. One that is on disk is read, checked and, if RAM has room, kept there.
    ///
    /// # Errors
    /// [`PagerError::Missing`], [`PagerError::Corrupt`] or [`PagerError::Io`].
    pub fn get(&self, page: u64) -> Result<Bytes, PagerError> {
        let (path, hash, length) = {
            let mut ledger = self.lock();
            if let Some(bytes) = ledger.touch(page) {
                ledger.counters.hits += 1;
                return Ok(bytes);
            }
            let Some(entry) = ledger.entry(page) else { return Err(PagerError::Missing(page)) };
            let found = (self.spill.file(page), entry.hash, entry.bytes);
            ledger.counters.misses += 1;
            found
        };
        let outcome = spill::read(&path, page, &hash);
        let mut ledger = self.lock();
        if ledger.entry(page).is_none() {
            // Released while we read.
            return Err(PagerError::Missing(page));
        }
        let bytes = match outcome {
            Ok(bytes) => bytes,
            // Others may have moved the page while we read without the lock; with it the answer is final.
            Err(_) => match ledger.touch(page) {
                Some(bytes) => return Ok(bytes),
                None => self.read_locked(&mut ledger, page, &hash)?,
            },
        };
        match self.make_ram_room(&mut ledger, length) {
            Ok(true) => ledger.enter_ram(page, bytes.clone()),
            Ok(false) => {}
            Err(error) => tracing::warn!(page, %error, "page stays on disk: no room could be made in RAM"),
        }
        Ok(bytes)
    }

    /// Up to `length` bytes of a page from `offset`; empty behind its end.
    ///
    /// # Errors
    /// As [`PageStore::get`]: a page from disk is checked as a whole before any part of it is given out.
    pub fn read(&self, page: u64, offset: u64, length: u32) -> Result<Bytes, PagerError> {
        let bytes = self.get(page)?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let end = start.saturating_add(length as usize).min(bytes.len());
        Ok(bytes.slice(start..end))
    }

    /// Extends the leases of those jobs that have pages here; returns how many have.
    pub fn renew(&self, jobs: &[JobId], now: Instant) -> usize {
        self.lock().renew(jobs, now + self.limits.lease)
    }

    /// Frees a job's pages; returns how many there were.
    pub fn release(&self, job: &JobId) -> usize {
        let mut ledger = self.lock();
        self.release_locked(&mut ledger, job)
    }

    /// Frees the pages of jobs whose lease ran out; returns those jobs.
    pub fn expire(&self, now: Instant) -> Vec<JobId> {
        let mut ledger = self.lock();
        let overdue = ledger.overdue(now);
        for job in &overdue {
            self.release_locked(&mut ledger, job);
            ledger.counters.expired += 1;
        }
        overdue
    }

    /// Counts for metrics.
    pub fn counters(&self) -> PagerCounters {
        self.lock().snapshot()
    }

    /// The node named in every [`PageRef`].
    pub fn node(&self) -> &ActorId {
        &self.node
    }

    fn read_locked(&self, ledger: &mut Ledger, page: u64, hash: &[u8; 16]) -> Result<Bytes, PagerError> {
        let outcome = spill::read(&self.spill.file(page), page, hash);
        if matches!(outcome, Err(PagerError::Corrupt(_))) {
            ledger.counters.corrupt += 1;
        }
        outcome
    }

    fn release_locked(&self, ledger: &mut Ledger, job: &JobId) -> usize {
        let (files, pages) = ledger.release(job);
        for page in files {
            self.spill.remove(page);
        }
        pages
    }

    /// Moves pages out of RAM, longest unused first, until `length` bytes fit. `false`: they cannot.
    fn make_ram_room(&self, ledger: &mut Ledger, length: u64) -> Result<bool, PagerError> {
        if length > self.limits.ram_bytes {
            return Ok(false);
        }
        while ledger.counters.ram_bytes + length > self.limits.ram_bytes {
            let Some(victim) = ledger.oldest_in_ram() else { return Ok(false) };
            if !self.move_to_disk(ledger, victim)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `false`: the disk budget does not allow it.
    fn move_to_disk(&self, ledger: &mut Ledger, page: u64) -> Result<bool, PagerError> {
        let Some(entry) = ledger.entry(page) else { return Ok(false) };
        let (length, on_disk, ram) = (entry.bytes, entry.on_disk, entry.ram.clone());
        if !on_disk {
            let Some(bytes) = ram else { return Ok(false) };
            if !self.make_disk_room(ledger, length, page) {
                return Ok(false);
            }
            self.spill.write(page, &bytes)?;
            ledger.counters.spills += 1;
            ledger.set_on_disk(page, true);
        }
        ledger.leave_ram(page);
        Ok(true)
    }

    /// Drops files of pages that RAM holds too, until `length` bytes fit. `false`: they cannot.
    fn make_disk_room(&self, ledger: &mut Ledger, length: u64, for_page: u64) -> bool {
        while ledger.counters.disk_bytes + length > self.limits.disk_bytes {
            let Some(copy) = ledger.clean_copy(for_page) else { return false };
            self.spill.remove(copy);
            ledger.set_on_disk(copy, false);
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn spill_folder(&self) -> PathBuf {
        self.spill.path().to_path_buf()
    }

    #[cfg(test)]
    pub(crate) fn spill_file(&self, page: u64) -> PathBuf {
        self.spill.file(page)
    }
}
