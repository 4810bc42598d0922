//! The threads that jobs are prepared on: a pool of a fixed size, in which a job's own parallel parts run too, so that a burst of
//! jobs leaves cores to planning, to NATS and to the device's thread.

use std::sync::Arc;

use millrace_runtime::Credits;
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use tokio::task::JoinError;

/// The pool, and room for as many jobs as it has threads.
#[derive(Debug)]
pub struct Cores {
    pool: Arc<ThreadPool>,
    room: Credits,
}

impl Cores {
    /// `threads` of them; 0: three quarters of the machine's cores.
    ///
    /// # Errors
    /// The system gives no threads.
    pub fn new(threads: usize) -> Result<Self, ThreadPoolBuildError> {
        let threads = match threads {
            0 => usual(std::thread::available_parallelism().map_or(1, usize::from)),
            threads => threads,
        };
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|n| format!("prepare-{n}")).build()?;
        Ok(Self { pool: Arc::new(pool), room: Credits::new(threads) })
    }

    /// Runs `work` in the pool as soon as a thread is free.
    ///
    /// # Errors
    /// It panicked.
    pub async fn run<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> Result<R, JoinError> {
        let core = self.room.acquire().await;
        let pool = Arc::clone(&self.pool);
        tokio::task::spawn_blocking(move || {
            let _core = core;
            pool.install(work)
        })
        .await
    }
}

fn usual(cores: usize) -> usize {
    cores - cores / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_many_cores_is_left_to_others() {
        assert_eq!([1, 2, 3, 4, 8, 16, 100].map(usual), [1, 2, 3, 3, 6, 12, 75]);
    }

    #[tokio::test]
    async fn work_sees_the_pool_and_its_panics_come_back() {
        let cores = Cores::new(3).unwrap();
        assert_eq!(cores.run(rayon::current_num_threads).await.unwrap(), 3);
        assert!(cores.run(|| -> () { panic!("on purpose") }).await.unwrap_err().is_panic());
        assert_eq!(cores.run(|| 7).await.unwrap(), 7);
    }
}
