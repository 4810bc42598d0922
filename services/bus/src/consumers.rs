//! The durable consumers of the work queue, one per class; every process pulls from the same ones.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, Config, DeliverPolicy, Info};
use millrace_config::StreamMode;
use millrace_protocol::Class;
use serde::Serialize;

use crate::Bus;
use crate::errors::BusError;
use crate::streams::{consumer_exists, consumer_missing, mismatch};

/// Pulls that may wait on one consumer.
const MAX_WAITING: i64 = 4_096;

#[derive(Serialize)]
struct Request<'a> {
    stream_name: &'a str,
    config: &'a Config,
    action: &'static str,
}

/// Name of a class's consumer.
pub(crate) fn consumer_name(class: Class) -> String {
    format!("pre-{class}")
}

impl Bus {
    pub(crate) async fn ensure_consumers(&self) -> Result<(), BusError> {
        for class in Class::ALL {
            self.ensure_consumer(class).await?;
        }
        Ok(())
    }

    async fn ensure_consumer(&self, class: Class) -> Result<(), BusError> {
        let streams = &self.inner.streams;
        let (stream, name) = (self.inner.subjects.jobs_stream(), consumer_name(class));
        let object = format!("consumer {stream}/{name}");
        let filter = self.inner.subjects.jobs_of_class(class);
        let wanted = Config {
            durable_name: Some(name.clone()),
            name: Some(name.clone()),
            description: Some(format!("Jobs of class {class}")),
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::Explicit,
            ack_wait: streams.ack_wait,
            // Attempts are judged by the preprocess actor, which can say why a job is given up.
            max_deliver: -1,
            max_ack_pending: i64::from(streams.max_ack_pending),
            max_waiting: MAX_WAITING,
            filter_subject: filter.clone(),
            ..Config::default()
        };
        let info = format!("$JS.API.CONSUMER.INFO.{stream}.{name}");
        let create = format!("$JS.API.CONSUMER.CREATE.{stream}.{name}.{filter}");
        let found: Info = match self.query("consumer info", info.clone()).await {
            Ok(found) => found,
            Err(error) if consumer_missing(&error) => {
                if streams.mode == StreamMode::Verify {
                    return Err(BusError::Missing { object });
                }
                // Strict: a create that meets another configuration must not destroy the consumer's state.
                let request = Request { stream_name: &stream, config: &wanted, action: "create" };
                match self.admin("consumer create", create.clone(), &request).await {
                    Ok(created) => created,
                    Err(error) if consumer_exists(&error) => self.query("consumer info", info).await?,
                    Err(error) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        };
        let Some((field, want, have)) = difference(&wanted, &found.config) else { return Ok(()) };
        if streams.mode == StreamMode::Verify {
            return Err(mismatch(object, field, want, have));
        }
        tracing::warn!(consumer = %name, field, %have, %want, "changing a consumer to what the configuration says");
        let changed = Config {
            ack_wait: wanted.ack_wait,
            max_ack_pending: wanted.max_ack_pending,
            max_waiting: found.config.max_waiting,
            max_deliver: wanted.max_deliver,
            ..found.config
        };
        let request = Request { stream_name: &stream, config: &changed, action: "update" };
        let updated: Info = self.admin("consumer update", create, &request).await?;
        match difference(&wanted, &updated.config) {
            Some((field, want, have)) => Err(mismatch(object, field, want, have)),
            None => Ok(()),
        }
    }

    /// The consumer's state.
    pub(crate) async fn consumer_info(&self, class: Class) -> Result<Info, BusError> {
        let (stream, name) = (self.inner.subjects.jobs_stream(), consumer_name(class));
        self.query("consumer info", format!("$JS.API.CONSUMER.INFO.{stream}.{name}")).await
    }
}

fn difference(wanted: &Config, found: &Config) -> Option<(&'static str, String, String)> {
    let duration = |value: Duration| format!("{value:?}");
    let fields = [
        ("filter_subject", wanted.filter_subject.clone(), found.filter_subject.clone()),
        ("ack_policy", format!("{:?}", wanted.ack_policy), format!("{:?}", found.ack_policy)),
        ("ack_wait", duration(wanted.ack_wait), duration(found.ack_wait)),
        ("max_deliver", wanted.max_deliver.to_string(), found.max_deliver.to_string()),
        ("max_ack_pending", wanted.max_ack_pending.to_string(), found.max_ack_pending.to_string()),
    ];
    fields.into_iter().find(|(_, wanted, found)| wanted != found)
}
