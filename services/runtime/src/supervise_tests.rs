//! Supervision against failing, panicking and draining futures, on paused time.

use std::cell::Cell;
use std::time::Duration;

use super::*;

const POLICY: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(1),
    healthy_after: Duration::from_secs(10),
};

#[tokio::test(start_paused = true)]
async fn errors_and_panics_are_restarted_until_it_finishes() {
    let (clock, _hand) = Clock::manual(0);
    let (gate, restarts, runs) = (DrainGate::new(), Restarts::default(), Cell::new(0));
    let outcome = supervise("t", POLICY, &clock, &gate, &restarts, || {
        let run = runs.replace(runs.get() + 1);
        async move {
            match run {
                0 => Err("broke"),
                1 => panic!("boom {run}"),
                2 => std::panic::panic_any(7_u8),
                _ => Ok(()),
            }
        }
    })
    .await;
    assert_eq!((outcome, restarts.count(), runs.get()), (Outcome::Finished, 3, 4));
}

#[tokio::test(start_paused = true)]
async fn a_factory_that_panics_is_restarted_too() {
    let (clock, _hand) = Clock::manual(0);
    let (gate, restarts, runs) = (DrainGate::new(), Restarts::default(), Cell::new(0));
    let outcome = supervise("t", POLICY, &clock, &gate, &restarts, || {
        assert!(runs.replace(runs.get() + 1) > 0, "first call");
        async { Ok::<(), String>(()) }
    })
    .await;
    assert_eq!((outcome, restarts.count()), (Outcome::Finished, 1));
}

#[tokio::test(start_paused = true)]
async fn draining_ends_the_wait_and_forbids_a_restart() {
    let (clock, _hand) = Clock::manual(0);
    let (gate, restarts) = (DrainGate::new(), Restarts::default());
    let supervised = tokio::spawn({
        let (gate, restarts) = (gate.clone(), restarts.clone());
        let policy = BackoffPolicy { first: Duration::from_secs(3_600), longest: Duration::from_secs(3_600), ..POLICY };
        async move { supervise("t", policy, &clock, &gate, &restarts, || async { Err::<(), _>("down") }).await }
    });
    while restarts.count() == 0 {
        tokio::task::yield_now().await;
    }
    gate.start_draining();
    assert_eq!(supervised.await.unwrap(), Outcome::FailedWhileDraining("down".into()));
}

#[tokio::test(start_paused = true)]
async fn draining_does_not_cut_off_a_running_future() {
    let (clock, _hand) = Clock::manual(0);
    let (gate, restarts) = (DrainGate::new(), Restarts::default());
    gate.start_draining();
    let outcome = supervise("t", POLICY, &clock, &gate, &restarts, || async {
        tokio::time::timeout(Duration::from_secs(5), std::future::pending::<()>()).await.unwrap_err();
        Ok::<(), String>(())
    })
    .await;
    assert_eq!((outcome, restarts.count()), (Outcome::Finished, 0));
}
