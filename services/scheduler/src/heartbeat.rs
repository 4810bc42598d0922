//! Signs of life for everything this scheduler holds: progress at the work queue, leases at the pagers. Must not know why
//! a job is held.

use std::collections::BTreeMap;

use bytes::Bytes;
use millrace_bus::Bus;
use millrace_protocol::pages::PageLease;
use millrace_protocol::{ActorId, JobId};

use crate::log::Origin;

/// Sends one round for all held jobs. What fails is tried again in the next round, well before anything runs out.
pub async fn beat(bus: Bus, held: Vec<(JobId, Origin)>) {
    let mut pages: BTreeMap<ActorId, Vec<JobId>> = BTreeMap::new();
    for (job, origin) in held {
        if let Err(error) = bus.ack_progress(&origin.delivery.ack_subject).await {
            tracing::warn!(%job, %error, "no sign of life sent for job");
        }
        for node in origin.nodes {
            pages.entry(node).or_default().push(job.clone());
        }
    }
    for (node, jobs) in pages {
        let Ok(body) = postcard::to_stdvec(&PageLease::Renew(jobs)) else { continue };
        if let Err(error) = bus.publish(&bus.subjects().page_lease(&node), Bytes::from(body)).await {
            tracing::warn!(%node, %error, "page leases not renewed");
        }
    }
}
