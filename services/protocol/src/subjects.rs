//! The subject grammar: `<prefix>.v1.<kind>...`, most selective token last. Built and parsed here only.

use crate::ids::{ActorId, InvalidToken, JobId, ModelName};
use crate::job::Class;

/// Builds every subject under one prefix. The prefix is one token, so several deployments share a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subjects {
    root: String,
}

/// What a job subject says: `<prefix>.v1.jobs.<class>.<model>.<job>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSubject {
    /// Service class.
    pub class: Class,
    /// Model asked for; it need not be one that is served.
    pub model: ModelName,
    /// Job identity.
    pub job: JobId,
}

impl Subjects {
    /// Subjects under `prefix`.
    ///
    /// # Errors
    /// [`InvalidToken`] if the prefix is not one subject token.
    pub fn new(prefix: &str) -> Result<Self, InvalidToken> {
        let prefix = ActorId::new(prefix)?;
        Ok(Self { root: format!("{prefix}.v1") })
    }

    /// Where a publisher puts a job.
    pub fn job(&self, class: Class, model: &ModelName, job: &JobId) -> String {
        format!("{}.jobs.{}.{model}.{job}", self.root, class.as_str())
    }

    /// All jobs: what the work-queue stream captures.
    pub fn jobs_all(&self) -> String {
        format!("{}.jobs.>", self.root)
    }

    /// All jobs of one class: what one durable consumer reads.
    pub fn jobs_of_class(&self, class: Class) -> String {
        format!("{}.jobs.{}.>", self.root, class.as_str())
    }

    /// Reads a job subject back; `None` if it does not follow the grammar.
    pub fn parse_job(&self, subject: &str) -> Option<JobSubject> {
        let rest = subject.strip_prefix(&self.root)?.strip_prefix(".jobs.")?;
        let mut tokens = rest.split('.');
        let class = Class::from_token(tokens.next()?)?;
        let model = ModelName::new(tokens.next()?).ok()?;
        let job = JobId::new(tokens.next()?).ok()?;
        tokens.next().is_none().then_some(JobSubject { class, model, job })
    }

    /// A job's output chunks, in order, fenced by `Nats-Expected-Last-Subject-Sequence`.
    pub fn out(&self, job: &JobId) -> String {
        format!("{}.out.{job}", self.root)
    }

    /// All output: what the output stream captures.
    pub fn out_all(&self) -> String {
        format!("{}.out.>", self.root)
    }

    /// Dead letters: jobs that ended for a reason worth a person's look, by error label.
    pub fn dead_letter(&self, label: &str, job: &str) -> String {
        format!("{}.dlq.{label}.{job}", self.root)
    }

    /// All dead letters.
    pub fn dead_letters_all(&self) -> String {
        format!("{}.dlq.>", self.root)
    }

    /// Live cancellation of one job (core); the tombstone for jobs not yet started is in the KV bucket.
    pub fn cancel(&self, job: &JobId) -> String {
        format!("{}.cancel.{job}", self.root)
    }

    /// All cancellations.
    pub fn cancel_all(&self) -> String {
        format!("{}.cancel.*", self.root)
    }

    /// The job named by a cancel subject.
    pub fn parse_cancel(&self, subject: &str) -> Option<JobId> {
        let rest = subject.strip_prefix(&self.root)?.strip_prefix(".cancel.")?;
        JobId::new(rest).ok()
    }

    /// A scheduler says that it lives, what it serves and how much it can take (core, [`crate::engine::SchedulerBeacon`]).
    pub fn scheduler_beacon(&self, scheduler: &ActorId) -> String {
        format!("{}.beacon.scheduler.{scheduler}", self.root)
    }

    /// All scheduler beacons.
    pub fn scheduler_beacons(&self) -> String {
        format!("{}.beacon.scheduler.*", self.root)
    }

    /// An executor says that it lives and what it holds (core, [`crate::engine::ExecutorBeacon`]).
    pub fn executor_beacon(&self, executor: &ActorId) -> String {
        format!("{}.beacon.executor.{executor}", self.root)
    }

    /// All executor beacons.
    pub fn executor_beacons(&self) -> String {
        format!("{}.beacon.executor.*", self.root)
    }

    /// Hand-off of a preprocessed job to one scheduler (request, [`crate::ready::Offer`]).
    pub fn offer(&self, scheduler: &ActorId) -> String {
        format!("{}.scheduler.{scheduler}.offer", self.root)
    }

    /// Step outputs on their way to one scheduler (core, [`crate::step::StepOutput`]).
    pub fn step(&self, scheduler: &ActorId) -> String {
        format!("{}.scheduler.{scheduler}.step", self.root)
    }

    /// A scheduler takes an executor (request, [`crate::engine::Attach`]).
    pub fn attach(&self, executor: &ActorId) -> String {
        format!("{}.executor.{executor}.attach", self.root)
    }

    /// Step plans on their way to one executor (core, [`crate::plan::StepPlan`]).
    pub fn plan(&self, executor: &ActorId) -> String {
        format!("{}.executor.{executor}.plan", self.root)
    }

    /// Reading a tensor page from the node that holds it (request, [`crate::pages::PageRead`]).
    pub fn page_read(&self, node: &ActorId) -> String {
        format!("{}.page.{node}.read", self.root)
    }

    /// Renewing and releasing a job's pages on the node that holds them (core, [`crate::pages::PageLease`]).
    pub fn page_lease(&self, node: &ActorId) -> String {
        format!("{}.page.{node}.lease", self.root)
    }

    /// Name of the work-queue stream.
    pub fn jobs_stream(&self) -> String {
        self.stream("JOBS")
    }

    /// Name of the output stream.
    pub fn out_stream(&self) -> String {
        self.stream("OUT")
    }

    /// Name of the dead-letter stream.
    pub fn dead_letter_stream(&self) -> String {
        self.stream("DLQ")
    }

    /// Name of the object bucket for media that are too large for a message.
    pub fn media_bucket(&self) -> String {
        self.stream("MEDIA")
    }

    /// Name of the key-value bucket of cancellation tombstones.
    pub fn cancel_bucket(&self) -> String {
        self.stream("CANCELLED")
    }

    fn stream(&self, kind: &str) -> String {
        format!("{}_{kind}", self.root.replace('.', "_").to_uppercase())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn job_subjects_parse_back() {
        let subjects = Subjects::new("millrace").unwrap();
        let (model, job) = (ModelName::new("demo").unwrap(), JobId::new("clip-42").unwrap());
        for class in Class::ALL {
            let text = subjects.job(class, &model, &job);
            let expected = JobSubject { class, model: model.clone(), job: job.clone() };
            assert_eq!(subjects.parse_job(&text), Some(expected));
        }
        for bad in [
            "millrace.v1.jobs.batch.demo",
            "millrace.v1.jobs.batch.demo.a.b",
            "x.v1.jobs.batch.demo.a",
            "millrace.v1.jobs.slow.demo.a",
        ] {
            assert_eq!(subjects.parse_job(bad), None, "{bad}");
        }
    }

    #[test]
    fn streams_are_named_after_the_prefix() {
        assert_eq!(Subjects::new("millrace").unwrap().jobs_stream(), "MILLRACE_V1_JOBS");
    }
}
