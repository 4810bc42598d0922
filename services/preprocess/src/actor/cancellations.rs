//! Cancellations of jobs that are held here, as they are heard.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_protocol::JobId;
use tokio::sync::watch;

/// Jobs that listen for their cancellation. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Cancellations {
    listening: Arc<Mutex<HashMap<JobId, watch::Sender<bool>>>>,
}

/// One job's ear. Dropping it stops listening.
#[derive(Debug)]
pub struct Listening {
    cancellations: Cancellations,
    job: JobId,
    heard: watch::Receiver<bool>,
}

impl Cancellations {
    /// Listens for the cancellation of `job`.
    pub fn listen(&self, job: &JobId) -> Listening {
        let (sender, heard) = watch::channel(false);
        self.lock().insert(job.clone(), sender);
        Listening { cancellations: self.clone(), job: job.clone(), heard }
    }

    /// Passes a cancellation on to whoever holds the job here.
    pub fn hear(&self, job: &JobId) {
        if let Some(sender) = self.lock().get(job) {
            sender.send_replace(true);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<JobId, watch::Sender<bool>>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listening {
    /// Ends when the job is cancelled, and not before.
    pub async fn cancelled(&mut self) {
        if self.heard.wait_for(|heard| *heard).await.is_err() {
            // A second delivery of the job listens now; it is the one to act.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut listening = self.cancellations.lock();
        let ours = listening.get(&self.job).is_some_and(|sender| sender.subscribe().same_channel(&self.heard));
        if ours {
            listening.remove(&self.job);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn only_the_named_job_hears() {
        let all = Cancellations::default();
        let (a, b) = (JobId::new("a").unwrap(), JobId::new("b").unwrap());
        let (mut one, mut two) = (all.listen(&a), all.listen(&b));
        all.hear(&a);
        one.cancelled().await;
        assert!(two.cancelled().now_or_never().is_none());
        drop(one);
        assert_eq!(all.lock().len(), 1);
    }

    #[tokio::test]
    async fn the_latest_listener_of_a_job_hears() {
        let all = Cancellations::default();
        let a = JobId::new("a").unwrap();
        let mut old = all.listen(&a);
        let mut new = all.listen(&a);
        all.hear(&a);
        new.cancelled().await;
        assert!(old.cancelled().now_or_never().is_none());
        drop(old);
        assert_eq!(all.lock().len(), 1, "dropping the old one leaves the new one");
    }
}
