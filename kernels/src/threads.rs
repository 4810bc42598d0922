//! Fork and join over a few worker threads, cheap enough for one call per op.
//!
//! The caller takes tasks too and never waits for a worker that has not joined; workers spin for a moment between calls, then
//! park. Which thread runs a task must not change its result.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;

/// Polls between two calls before a worker parks: about 20 microseconds.
const SPINS: u32 = 2_000;

type Task = dyn Fn(usize) + Sync;

/// One call's tasks. `task` points into the caller's frame, which outlives every use: see [`Threads::run`].
struct Call {
    task: *const Task,
    count: usize,
    next: AtomicUsize,
    panicked: AtomicBool,
}

// SAFETY: `task` is Sync, and only followed while its owner waits in `Threads::run`.
unsafe impl Send for Call {}
// SAFETY: as above.
unsafe impl Sync for Call {}

impl Call {
    /// Takes tasks until none is left.
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                return;
            }
            // SAFETY: the owner of the task is inside `Threads::run` while any thread works on this call.
            let task = unsafe { &*self.task };
            if catch_unwind(AssertUnwindSafe(|| task(index))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
    }
}

#[derive(Default)]
struct Slot {
    call: Option<Arc<Call>>,
    /// Workers that wait to be notified.
    parked: usize,
    closing: bool,
}

#[derive(Default)]
struct Shared {
    slot: Mutex<Slot>,
    wake: Condvar,
    /// Grows with each call, under `slot`: what spinning workers look at.
    epoch: AtomicU64,
    /// Workers inside the current call; changed up only under `slot`.
    joined: AtomicUsize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut seen = 0;
        loop {
            for _ in 0..SPINS {
                if self.epoch.load(Ordering::Acquire) != seen {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut slot = self.lock();
            while self.epoch.load(Ordering::Acquire) == seen && !slot.closing {
                slot.parked += 1;
                slot = self.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
                slot.parked -= 1;
            }
            if slot.closing {
                return;
            }
            seen = self.epoch.load(Ordering::Acquire);
            let Some(call) = slot.call.clone() else { continue };
            self.joined.fetch_add(1, Ordering::AcqRel);
            drop(slot);
            call.work();
            self.joined.fetch_sub(1, Ordering::Release);
        }
    }
}

/// A caller's own workers.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One call at a time; a second caller runs its tasks alone.
    busy: Mutex<()>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("workers", &self.workers.len()).finish()
    }
}

impl Threads {
    /// `count` threads including the caller. Fewer if the OS refuses.
    pub(crate) fn new(count: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let workers = (1..count)
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("kernel-{i}")).spawn(move || shared.serve()).ok()
            })
            .collect();
        Self { shared, workers, busy: Mutex::new(()) }
    }

    /// Threads that share the work of one call.
    pub(crate) fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0..count)`, each once, on any threads, and returns when all have ended.
    ///
    /// # Panics
    /// If a task panicked.
    pub(crate) fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        if count < 2 || self.workers.is_empty() {
            (0..count).for_each(task);
            return;
        }
        let guard = match self.busy.try_lock() {
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            other => other.ok(),
        };
        if guard.is_none() {
            (0..count).for_each(task);
            return;
        }
        // SAFETY: only the lifetime is changed; the pointer is followed by this thread and by workers counted in `joined`,
        // and this function returns after the slot is emptied (nobody joins any more) and `joined` has fallen to zero.
        let task = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(task) };
        let call = Arc::new(Call { task, count, next: AtomicUsize::new(0), panicked: AtomicBool::new(false) });
        let parked = {
            let mut slot = self.shared.lock();
            slot.call = Some(Arc::clone(&call));
            self.shared.epoch.fetch_add(1, Ordering::AcqRel);
            slot.parked
        };
        if parked > 0 {
            self.shared.wake.notify_all();
        }
        call.work();
        self.shared.lock().call = None;
        let mut polls = 0u32;
        while self.shared.joined.load(Ordering::Acquire) != 0 {
            polls += 1;
            if polls > SPINS { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        assert!(!call.panicked.load(Ordering::Relaxed), "a kernel task panicked");
    }

    /// Splits `out` into pieces of `piece` elements and calls `task(piece index, piece)` for each.
    pub(crate) fn for_pieces<T: Send>(&self, out: &mut [T], piece: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        let length = out.len();
        let start = SharedMut(out.as_mut_ptr());
        self.run(length.div_ceil(piece.max(1)), &|index| {
            let from = index * piece;
            // SAFETY: pieces of different indices do not overlap, each index runs once, and `out` is borrowed for the call.
            let slice = unsafe { std::slice::from_raw_parts_mut(start.get().add(from), piece.min(length - from)) };
            task(index, slice);
        });
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics, so it ends cleanly.
            let _ = worker.join();
        }
    }
}

/// A pointer that tasks write through, each to its own elements.
pub(crate) struct SharedMut<T>(pub(crate) *mut T);

impl<T> SharedMut<T> {
    /// The pointer. A method, so that closures capture the wrapper and not the raw pointer inside.
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: whoever writes through it shows at the place of use that no two tasks touch the same element.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let threads = Threads::new(threads);
            for count in [0usize, 1, 2, 7, 1000] {
                let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                threads.run(count, &|i| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_calls_lose_nothing() {
        let threads = Threads::new(3);
        let total = AtomicUsize::new(0);
        for _ in 0..5_000 {
            threads.run(4, &|i| {
                total.fetch_add(i, Ordering::Relaxed);
            });
        }
        assert_eq!(total.load(Ordering::Relaxed), 5_000 * 6);
    }

    #[test]
    fn a_call_inside_a_task_runs_alone() {
        let threads = Threads::new(2);
        let total = AtomicUsize::new(0);
        threads.run(3, &|_| {
            threads.run(4, &|i| {
                total.fetch_add(i, Ordering::Relaxed);
            })
        });
        assert_eq!(total.load(Ordering::Relaxed), 18);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_workers_survive() {
        let threads = Threads::new(2);
        let panicked = catch_unwind(AssertUnwindSafe(|| threads.run(8, &|i| assert!(i != 5))));
        assert!(panicked.is_err());
        let ran = AtomicUsize::new(0);
        threads.run(8, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn pieces_cover_the_slice() {
        let threads = Threads::new(2);
        let mut out = vec![0usize; 103];
        threads.for_pieces(&mut out, 10, |piece, slice| slice.fill(piece + 1));
        assert!(out.iter().enumerate().all(|(i, &v)| v == i / 10 + 1));
    }
}
