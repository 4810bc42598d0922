//! Readiness as named conditions with reasons. Must not judge: each part of a process sets its own condition.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The conditions of one process; clones share them. A process with no failed condition is ready.
#[derive(Debug, Clone, Default)]
pub struct Health {
    failed: Arc<Mutex<BTreeMap<String, Option<String>>>>,
}

impl Health {
    /// No conditions: ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// The condition holds.
    pub fn set_ready(&self, condition: &str) {
        self.conditions().insert(condition.to_string(), None);
    }

    /// The condition does not hold, because of `reason`.
    pub fn set_not_ready(&self, condition: &str, reason: impl Into<String>) {
        self.conditions().insert(condition.to_string(), Some(reason.into()));
    }

    /// Forgets a condition, with whatever set it.
    pub fn remove(&self, condition: &str) {
        self.conditions().remove(condition);
    }

    /// Whether every condition holds.
    pub fn is_ready(&self) -> bool {
        self.conditions().values().all(Option::is_none)
    }

    /// All conditions by name, with the reason where one does not hold.
    pub fn snapshot(&self) -> BTreeMap<String, Option<String>> {
        self.conditions().clone()
    }

    fn conditions(&self) -> MutexGuard<'_, BTreeMap<String, Option<String>>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
