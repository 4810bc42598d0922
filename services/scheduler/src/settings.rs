//! What the scheduler takes from the configuration, checked for contradictions. Must not read files or the environment.

use std::time::Duration;

use crate::error::SchedulerError;
use crate::policy::Limits;

/// Settings of one scheduler.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Limits of planning.
    pub limits: Limits,
    /// Jobs accepted beyond those that run.
    pub waiting: usize,
    /// Least time between two chunks of a job outside the interactive class.
    pub coalesce: Duration,
    /// Silence after which the queue delivers a job again.
    pub ack_wait: Duration,
    /// Longest wait for running jobs when draining.
    pub drain_timeout: Duration,
    /// Longest wait for the output of a step. Lost messages and dead executors are noticed sooner.
    pub step_timeout: Duration,
}

impl Settings {
    /// Takes the sections that concern the scheduler.
    ///
    /// # Errors
    /// [`SchedulerError::Config`] names keys whose values leave no room for a single job.
    pub fn from_config(
        scheduler: &millrace_config::Scheduler,
        streams: &millrace_config::Streams,
        drain: &millrace_config::Drain,
    ) -> Result<Self, SchedulerError> {
        let zero = [
            ("step_tokens", scheduler.step_tokens),
            ("max_sequences", scheduler.max_sequences),
            ("run_ahead", scheduler.run_ahead),
        ];
        if let Some((key, _)) = zero.iter().find(|(_, value)| *value == 0) {
            return Err(SchedulerError::Config(format!("{key} must be at least 1")));
        }
        Ok(Self {
            limits: Limits {
                max_running: scheduler.max_sequences as usize,
                step_tokens: scheduler.step_tokens as usize,
                // The engine's own limit holds.
                step_patches: u32::MAX,
                watermark_blocks: scheduler.watermark_blocks as usize,
                ageing: scheduler.ageing,
                tenant_weights: scheduler.tenant_weights.clone(),
                prefix_cache: scheduler.prefix_cache,
                run_ahead: scheduler.run_ahead as usize,
                // The server says it once connected.
                plan_bytes: usize::MAX,
            },
            waiting: scheduler.waiting as usize,
            coalesce: scheduler.coalesce,
            ack_wait: streams.ack_wait,
            // The rest of the time is for giving back what has not ended.
            drain_timeout: drain.timeout.mul_f64(0.8),
            step_timeout: scheduler.step_timeout,
        })
    }
}
