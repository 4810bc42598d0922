//! Credits: owned permits that travel with the work, so that no queue can grow past their number.
//! Must not queue anything itself.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A pool of credits. Clones share the pool.
#[derive(Debug, Clone)]
pub struct Credits {
    pool: Arc<Semaphore>,
    total: usize,
}

/// One credit. Dropping it gives it back.
#[derive(Debug)]
#[must_use = "a dropped credit is free again at once"]
pub struct Credit {
    _permit: OwnedSemaphorePermit,
}

impl Credits {
    /// A pool of `total` credits; more than tokio's limit (2^61) are cut to it.
    pub fn new(total: usize) -> Self {
        let total = total.min(Semaphore::MAX_PERMITS);
        Self { pool: Arc::new(Semaphore::new(total)), total }
    }

    /// Waits for a credit; waiters are served in order.
    pub async fn acquire(&self) -> Credit {
        match Arc::clone(&self.pool).acquire_owned().await {
            Ok(permit) => Credit { _permit: permit },
            // The pool is private and never closed, so this arm is not reached; waiting is the harmless answer.
            Err(_closed) => std::future::pending().await,
        }
    }

    /// Takes a credit if one is free.
    pub fn try_acquire(&self) -> Option<Credit> {
        Arc::clone(&self.pool).try_acquire_owned().ok().map(|permit| Credit { _permit: permit })
    }

    /// Free credits now.
    pub fn available(&self) -> usize {
        self.pool.available_permits()
    }

    /// All credits, free or not.
    pub fn total(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn a_dropped_credit_is_free_again() {
        let credits = Credits::new(1);
        let held = credits.try_acquire().expect("one is free");
        assert!(credits.try_acquire().is_none());
        assert!(credits.acquire().now_or_never().is_none());
        drop(held);
        assert_eq!((credits.available(), credits.total()), (1, 1));
        assert!(credits.acquire().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_credit_moves_between_tasks_and_wakes_a_waiter() {
        let credits = Credits::new(1);
        let held = credits.acquire().await;
        let waiter = tokio::spawn({
            let credits = credits.clone();
            async move {
                let _credit = credits.acquire().await;
            }
        });
        tokio::spawn(async move { drop(held) }).await.unwrap();
        waiter.await.unwrap();
        assert_eq!(credits.available(), 1);
    }
}
