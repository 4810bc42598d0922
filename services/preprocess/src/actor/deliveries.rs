//! The heartbeat of held deliveries: as long as a job is held here, the work queue is told so.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millrace_bus::Bus;

/// Ack subjects of all deliveries held by this process's preprocess actor. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Deliveries {
    held: Arc<Mutex<HashSet<String>>>,
}

/// One held delivery. Dropping it stops its heartbeat: the queue delivers the job again once the ack wait is over, unless
/// somebody else answers for it.
#[derive(Debug)]
pub struct Held {
    deliveries: Deliveries,
    ack_subject: String,
}

impl Deliveries {
    /// Holds a delivery.
    pub fn hold(&self, ack_subject: &str) -> Held {
        self.lock().insert(ack_subject.to_owned());
        Held { deliveries: self.clone(), ack_subject: ack_subject.to_owned() }
    }

    /// Tells the queue about every held delivery, three times an ack wait, for ever.
    pub async fn beat(self, bus: Bus, ack_wait: Duration) {
        let mut ticks = tokio::time::interval(ack_wait / 3);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let subjects: Vec<String> = self.lock().iter().cloned().collect();
            for subject in subjects {
                if let Err(error) = bus.ack_progress(&subject).await {
                    tracing::warn!(%error, "heartbeat of a delivery not sent");
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.deliveries.lock().remove(&self.ack_subject);
    }
}
