//! Builds the actors of each role from the configuration.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use millrace_config::{Dtype, Executor, Model};
use millrace_executor::{
    Dtype as EngineDtype, ENCODER_DEVICE_BYTES, ExecutorActor, ExecutorMetrics, ExecutorParts, KvBudget, LoadOptions,
};
use millrace_preprocess::{Cores, Preparer, PreprocessActor, PreprocessMetrics, PreprocessParts};
use millrace_protocol::ActorId;
use millrace_runtime::Clock;
use millrace_scheduler::{SchedulerActor, SchedulerMetrics, SchedulerParts, Settings};

use super::{Roles, Shared};
use crate::device::device_kind;
use crate::prepare_limits::prepare_limits;

/// Addresses that keep the actors alive.
pub(super) struct Running {
    _preprocess: Option<actix::Addr<PreprocessActor>>,
    _schedulers: Vec<actix::Addr<SchedulerActor>>,
    _executors: Vec<actix::Addr<ExecutorActor>>,
}

/// An identity that no other incarnation has.
pub(super) fn new_id(role: &str, clock: &Clock) -> Result<ActorId> {
    let random = RandomState::new().build_hasher().finish();
    Ok(ActorId::new(format!("{role}-{:x}-{:08x}", clock.unix_ms(), random as u32))?)
}

/// Starts everything, executors first, so that a scheduler finds one at once.
pub(super) async fn start(shared: Shared, roles: Roles) -> Result<Running> {
    if shared.config.models.is_empty() {
        bail!("no model is configured: add [[models]] to pipeline.toml, or give --model DIR");
    }
    let mut running = Running { _preprocess: None, _schedulers: Vec::new(), _executors: Vec::new() };
    if roles.execute {
        let metrics = ExecutorMetrics::register(&shared.registry)?;
        for model in &shared.config.models {
            running._executors.push(executor(&shared, model, &metrics).await?);
        }
    }
    if roles.schedule {
        let metrics = SchedulerMetrics::new(&shared.registry)?;
        for model in &shared.config.models {
            running._schedulers.push(scheduler(&shared, model, &metrics).await?);
        }
    }
    if roles.preprocess {
        running._preprocess = Some(preprocess(&shared).await?);
    }
    Ok(running)
}

/// How `[executor]` says that `model` is loaded. May open a device, so it belongs on a blocking thread.
pub fn load_options(settings: &Executor, model: &Model, executor: ActorId) -> LoadOptions {
    let device = device_kind(settings.device);
    LoadOptions {
        executor,
        model: model.name.clone(),
        device,
        dtype: match settings.dtype {
            Dtype::Bf16 => EngineDtype::Bf16,
            Dtype::F32 => EngineDtype::F32,
            Dtype::Auto => device.default_dtype(),
        },
        kv: settings.kv_bytes.map_or(KvBudget::Auto, KvBudget::Bytes),
        block_tokens: settings.block_tokens,
        slots: settings.slots,
        step_tokens: settings.step_tokens,
        step_patches: settings.step_patches,
        encoder_device_bytes: ENCODER_DEVICE_BYTES,
        encoder_host_bytes: settings.encoder_host_bytes,
        keep_logits: false,
    }
}

async fn executor(shared: &Shared, model: &Model, metrics: &ExecutorMetrics) -> Result<actix::Addr<ExecutorActor>> {
    let (settings, served) = (shared.config.executor.clone(), model.clone());
    let id = new_id("exec", &shared.clock)?;
    let loaded = tokio::task::spawn_blocking(move || {
        let options = load_options(&settings, &served, id);
        millrace_executor::load(Path::new(&served.path), &options).map(|engine| (options, engine))
    });
    let (options, engine) = loaded.await?.with_context(|| format!("model `{}` in {}", model.name, model.path))?;
    let parts = ExecutorParts {
        id: options.executor,
        engine,
        swap_bytes: shared.config.executor.swap_bytes,
        bus: shared.bus.clone(),
        pages: shared.pages.clone(),
        clock: shared.clock.clone(),
        health: shared.health.clone(),
        metrics: metrics.clone(),
        fatal: shared.fatal.clone(),
        in_use: shared.devices.enter(),
    };
    Ok(ExecutorActor::start(parts).await?)
}

async fn scheduler(shared: &Shared, model: &Model, metrics: &SchedulerMetrics) -> Result<actix::Addr<SchedulerActor>> {
    let config = &shared.config;
    let parts = SchedulerParts {
        id: new_id("sched", &shared.clock)?,
        model: model.name.clone(),
        model_dir: model.path.clone().into(),
        bus: shared.bus.clone(),
        settings: Settings::from_config(&config.scheduler, &config.streams, &config.drain)?,
        metrics: metrics.clone(),
        clock: shared.clock.clone(),
        health: shared.health.clone(),
        drain: shared.running.clone(),
        fatal: shared.fatal.clone(),
    };
    Ok(SchedulerActor::start(parts).await?)
}

async fn preprocess(shared: &Shared) -> Result<actix::Addr<PreprocessActor>> {
    let limits = prepare_limits(&shared.config);
    let mut models = HashMap::new();
    for model in &shared.config.models {
        let preparer = Preparer::load(Path::new(&model.path), limits.clone());
        let preparer = preparer.with_context(|| format!("model `{}` in {}", model.name, model.path))?;
        models.insert(model.name.clone(), Arc::new(preparer));
    }
    let pages = shared.pages.clone().context("preprocess without a pager")?;
    let cores = Cores::new(shared.config.preprocess.threads).context("no threads for preprocessing")?;
    let parts = PreprocessParts {
        cores,
        id: shared.node.clone(),
        bus: shared.jobs.as_ref().unwrap_or(&shared.bus).clone(),
        models,
        pages,
        config: shared.config.clone(),
        clock: shared.clock.clone(),
        health: shared.health.clone(),
        drain: shared.intake.clone(),
        metrics: PreprocessMetrics::register(&shared.registry)?,
        fatal: shared.fatal.clone(),
    };
    Ok(PreprocessActor::start(parts).await?)
}
