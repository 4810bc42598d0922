//! Pairs of schedulers and executors that are added, drained and killed while jobs of two models run.

use anyhow::Result;
use millrace_protocol::{Class, Status};
use millrace_tests::cluster::{Cluster, MODEL};
use millrace_tests::service::Service;
use millrace_tests::workspace::root;

use super::{long_job, shown, undisturbed};

const OTHER: &str = "other";

/// A process that serves both models.
async fn run(cluster: &Cluster, role: &str, name: &str) -> Result<Service> {
    let path = root().join("deploy/demo/model");
    let extra = format!("[[models]]\nname = \"{OTHER}\"\npath = \"{}\"\ndefault = false", path.display());
    Service::start(&[role], &cluster.config(name, &extra)?).await
}

#[tokio::test]
async fn pairs_are_added_drained_and_killed_while_jobs_of_two_models_run() -> Result<()> {
    let cluster = Cluster::start().await?;
    let preprocess = run(&cluster, "preprocess", "preprocess").await?;
    let first = run(&cluster, "schedule", "first").await?;
    let doomed = run(&cluster, "execute", "doomed").await?;
    let mut calm = Vec::new();
    for seed in [21, 22] {
        calm.push((seed, undisturbed(&cluster, seed).await?));
    }
    let mut jobs = Vec::new();
    for (seed, text) in &calm {
        for model in [MODEL, OTHER] {
            let id = format!("{model}-{seed}");
            let body = serde_json::to_vec(&long_job(*seed))?;
            cluster.publish_raw(Class::Interactive, model, &id, body.into()).await?;
            jobs.push((id, text));
        }
    }
    for (id, _) in &jobs {
        shown(&cluster, id).await?;
    }
    // A second pair comes while they run; then the first one's executor dies.
    let second = run(&cluster, "schedule", "second").await?;
    let spare = run(&cluster, "execute", "spare").await?;
    doomed.kill().await?;
    let late = run(&cluster, "execute", "late").await?;
    // The first scheduler goes in order, with whatever it holds at this moment.
    assert_eq!(first.terminate().await?, 0);
    for (id, text) in &jobs {
        let (last, _) = cluster.finished(id).await?;
        assert_eq!((last.status, &&last.text), (Status::Done, text), "{id}");
    }
    // What is left serves both models.
    for model in [MODEL, OTHER] {
        let id = format!("after-{model}");
        let body = serde_json::to_vec(&long_job(21))?;
        cluster.publish_raw(Class::Interactive, model, &id, body.into()).await?;
        assert_eq!(cluster.finished(&id).await?.0.text, calm[0].1);
    }
    for service in [preprocess, second, spare, late] {
        assert_eq!(service.terminate().await?, 0);
    }
    assert_eq!(cluster.queued().await?, 0);
    Ok(())
}
