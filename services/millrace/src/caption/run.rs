//! One window as a stream of events: bytes to where the job finds them, publish, follow to the end. A fault on this
//! way ends the window as a failure with a code, like one the service reports, so that the others go on.

use futures::stream::{LocalBoxStream, StreamExt};
use millrace_protocol::output::{Chunk, Final, Status};
use millrace_protocol::{Class, ErrorCode, JobError, JobId};
use millrace_runtime::Clock;

use super::job::{Carrier, Wishes, caption_job};
use super::plan::FilePlan;
use super::progress::Uploads;
use super::render::Place;
use super::window::Window;
use crate::service::Service;

/// A window with its number and its job's name.
#[derive(Clone)]
pub struct WindowJob<'a> {
    /// Place in the output order.
    pub number: usize,
    /// The job.
    pub id: JobId,
    /// The file.
    pub plan: &'a FilePlan,
    /// The part of it.
    pub window: Option<Window>,
}

/// What happens to a window.
#[derive(Debug)]
pub enum Event {
    /// It is being worked on.
    Started(usize),
    /// New text.
    Delta {
        /// The window.
        number: usize,
        /// Text to append.
        text: String,
        /// Tokens of it.
        tokens: usize,
    },
    /// The end.
    Ended {
        /// The window.
        number: usize,
        /// How.
        last: Box<Final>,
    },
}

/// A prefix of job names that no other run has: the time in milliseconds and the process.
pub fn fresh_prefix(clock: &Clock) -> String {
    format!("caption-{:x}-{:x}", clock.unix_ms(), std::process::id())
}

impl<'a> WindowJob<'a> {
    /// Numbers every window of every file in order.
    ///
    /// # Errors
    /// Only if `prefix` were not part of a subject token.
    pub fn number(plans: &'a [FilePlan], prefix: &str) -> anyhow::Result<Vec<Self>> {
        let parts = plans.iter().flat_map(|plan| plan.windows.iter().map(move |&window| (plan, window)));
        parts
            .enumerate()
            .map(|(number, (plan, window))| {
                Ok(Self { number, id: JobId::new(format!("{prefix}-{number}"))?, plan, window })
            })
            .collect()
    }

    /// What the caption belongs to.
    pub fn place(&self) -> Place {
        Place { path: self.plan.input.name.clone(), window: self.window }
    }
}

/// Publishes `job` and follows it.
pub fn events<'a>(
    service: &'a Service,
    job: WindowJob<'a>,
    wishes: &'a Wishes,
    class: Class,
    uploads: &'a Uploads,
) -> LocalBoxStream<'a, Event> {
    let number = job.number;
    let published = async move {
        let sent = publish(service, &job, wishes, class, uploads).await;
        match sent {
            Ok(()) => service
                .follow(&job.id, Some(&wishes.model))
                .map(move |chunk| chunk_event(number, chunk.map(|chunk| chunk.chunk)))
                .boxed_local(),
            Err(error) => ended(number, &error),
        }
    };
    let started = futures::stream::iter([Event::Started(number)]);
    let rest = futures::stream::once(published).flatten().filter_map(futures::future::ready);
    started.chain(rest).boxed_local()
}

async fn publish(
    service: &Service,
    job: &WindowJob<'_>,
    wishes: &Wishes,
    class: Class,
    uploads: &Uploads,
) -> anyhow::Result<()> {
    let carrier = job.plan.carrier.get_or_try_init(|| carry(service, job.plan, uploads)).await?;
    let request = caption_job(job.id.clone(), job.plan.input.kind, carrier, job.window, wishes);
    service.publish(class, &wishes.model, &job.id, &request).await
}

async fn carry(service: &Service, plan: &FilePlan, uploads: &Uploads) -> anyhow::Result<Carrier> {
    if plan.inline() {
        return Ok(Carrier::Inline(tokio::fs::read(&plan.input.path).await?));
    }
    let bar = uploads.start(&plan.input.name, plan.input.size_bytes);
    let stored = service.put_media(&plan.input.path, |bytes| bar.inc(bytes)).await;
    bar.finish_and_clear();
    Ok(Carrier::Object(stored?))
}

fn chunk_event(number: usize, chunk: anyhow::Result<Chunk>) -> Option<Event> {
    match chunk {
        Ok(Chunk::Claim { .. }) => None,
        Ok(Chunk::Delta { token_ids, text, .. }) => Some(Event::Delta { number, text, tokens: token_ids.len() }),
        Ok(Chunk::Final(last)) => Some(Event::Ended { number, last }),
        Err(error) => Some(Event::Ended { number, last: Box::new(broken(&error)) }),
    }
}

fn ended<'a>(number: usize, error: &anyhow::Error) -> LocalBoxStream<'a, Option<Event>> {
    let last = Box::new(broken(error));
    futures::stream::iter([Some(Event::Ended { number, last })]).boxed_local()
}

/// A failure on the way to or from the service, in the shape of one that the service reports.
pub fn broken(error: &anyhow::Error) -> Final {
    let error = Some(JobError::new(ErrorCode::Overloaded, format!("{error:#}")));
    Final { error, ..Final::bare(Status::Failed) }
}
