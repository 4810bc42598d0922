//! kill -9 of the server under a working bus: what was stored stays, calls fail in time, and everything goes on.

use std::time::Duration;

use millrace_bus::Bus;
use millrace_protocol::Class;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::output::{claim, delta, end};
use crate::support::{Server, job, model, publish, server, soon, streams};

fn signal(server: &Server, signal: Signal) {
    let pid = server.managed.pid().unwrap();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// Waits until every thread of the server stands still.
async fn stopped(server: &Server) {
    let tasks = format!("/proc/{}/task", server.managed.pid().unwrap());
    let still = |task: std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
    };
    while !std::fs::read_dir(&tasks).unwrap().flatten().all(still) {
        tokio::task::yield_now().await;
    }
}

/// Calls until one succeeds, as an actor with a retry loop does.
async fn until_published(bus: &Bus, name: &str) -> millrace_bus::Published {
    soon(async {
        loop {
            match bus.publish_job(Class::Batch, &model(), &job(name), "{}".into()).await {
                Ok(published) => return published,
                Err(error) => assert_eq!(error.kind(), millrace_bus::Kind::Retry, "{error}"),
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

#[tokio::test]
async fn a_killed_server_comes_back_with_everything_and_the_bus_recovers() {
    let server = server().await;
    let bus = server.bus(&streams()).await;
    publish(&bus, "before").await;
    let out = job("out");
    let claimed = bus.append(&out, 0, &claim(&out, "me")).await.unwrap();
    let mut follow = bus.follow(&out, 0).await.unwrap();
    assert_eq!(soon(follow.next()).await.unwrap().unwrap().0, claimed);
    let mut requests = bus.subscribe("test.echo", 16, None).await.unwrap();

    signal(&server, Signal::SIGKILL);

    assert!(!until_published(&bus, "after").await.duplicate);
    assert_eq!(server.managed.restarts(), 1);
    assert_eq!((bus.events().reconnects(), bus.events().disconnects()), (1, 1));
    let jobs = soon(bus.job_consumer(Class::Batch).pull(5, Duration::from_secs(5))).await.unwrap();
    assert_eq!(jobs.len(), 2);
    bus.ack_final(&jobs[0].delivery.ack_subject).await.unwrap();
    let shown = bus.append(&out, claimed, &delta(&out, 0)).await.unwrap();
    bus.append(&out, shown, &end(&out, 1)).await.unwrap();
    assert_eq!(soon(follow.next()).await.unwrap().unwrap().1, delta(&out, 0));
    assert_eq!(soon(follow.next()).await.unwrap().unwrap().1, end(&out, 1));
    bus.publish("test.echo", "again".into()).await.unwrap();
    assert_eq!(soon(requests.next()).await.unwrap().payload, "again");
    assert_eq!(bus.requests_waiting(), 0);
}

#[tokio::test]
async fn calls_to_a_hanging_server_end_in_time_and_leave_nothing() {
    let server = server().await;
    let mut nats = crate::support::nats(server.managed.url());
    nats.request_timeout = Duration::from_millis(300);
    let bus = Bus::connect(&nats, &streams(), "test", millrace_runtime::Clock::system()).await.unwrap();
    server.bus(&streams()).await;
    let out = job("out");
    let claimed = bus.append(&out, 0, &claim(&out, "me")).await.unwrap();

    signal(&server, Signal::SIGSTOP);
    soon(stopped(&server)).await;
    let (model, name, chunk) = (model(), job("a"), delta(&out, 0));
    let (published, appended, asked) = soon(async {
        tokio::join!(
            bus.publish_job(Class::Batch, &model, &name, "{}".into()),
            bus.append(&out, claimed, &chunk),
            bus.request("test.nobody", "".into(), Duration::from_millis(200)),
        )
    })
    .await;
    assert_eq!(published.unwrap_err().label(), "timeout");
    assert!(appended.is_err());
    assert_eq!(asked.unwrap_err().label(), "timeout");
    assert_eq!(bus.requests_waiting(), 0);

    signal(&server, Signal::SIGCONT);
    // Both messages were on their way all along: repeating them must find them, not store them twice.
    let stored = soon(async {
        loop {
            if let Ok(stored) = bus.append(&out, claimed, &delta(&out, 0)).await {
                return stored;
            }
        }
    })
    .await;
    assert!(until_published(&bus, "a").await.duplicate);
    let log = bus.out_read(&out).await.unwrap();
    assert_eq!(log.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), [claimed, stored]);
}
