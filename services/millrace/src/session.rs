//! A service to work with, for commands that must work with one command: one that already runs, or one that this
//! process runs for as long as it needs it.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use futures::future::LocalBoxFuture;
use millrace_config::{Config, NatsUrl};
use millrace_protocol::ModelName;
use millrace_telemetry::Registry;

use crate::caption::progress::Board;
use crate::cli::settings::{SettingsArgs, fetch_models, parse_models, replace_models};
use crate::compose::{self, Roles};
use crate::exit::{unavailable, usage};
use crate::model_source::ModelArg;
use crate::service::Service;

/// Beacons come four times a second: silence for this long means that nobody is there.
const LISTEN: Duration = Duration::from_millis(700);

/// A service and the model to ask for.
pub struct Session {
    /// The service.
    pub service: Service,
    /// The model.
    pub model: ModelName,
    /// Metrics of the service, if this process runs it.
    pub registry: Option<Registry>,
    /// Ends if this process serves and the actors stop.
    serving: Option<LocalBoxFuture<'static, anyhow::Result<ExitCode>>>,
}

impl Session {
    /// Finds a service that serves `model` (the configured default if `None`), or starts one in this process. With
    /// `--nats URL` nothing is started.
    ///
    /// # Errors
    /// Usage faults for the model, an unavailable service for everything else that keeps it from starting.
    pub async fn open(
        settings: &SettingsArgs,
        mut config: Config,
        model: Option<&str>,
        board: &Board,
    ) -> anyhow::Result<Self> {
        let named = named(model, &config, settings.nats.is_some())?;
        board.say("looking for NATS");
        let service = Service::connect(&config, "millrace caption").await?;
        if !service.manages_server() {
            board.say(format!("looking for a service with `{}`", named.name));
            let served = service.served_models(LISTEN, Some(&named.name)).await?;
            if served.contains(&named.name) {
                return Ok(Self { service, model: named.name, registry: None, serving: None });
            }
            if settings.nats.is_some() || matches!(config.nats.url, NatsUrl::Url(_)) {
                let url = service.url();
                let names: Vec<&str> = served.iter().map(ModelName::as_str).collect();
                return Err(unavailable(match names.is_empty() {
                    true => format!("nobody serves at {url}; start `millrace up --nats {url}`, or leave out --nats"),
                    false => format!("`{}` is not served at {url}; --model can be: {}", named.name, names.join(", ")),
                }));
            }
        }
        if let Some(arg) = named.arg {
            replace_models(&mut config, &[arg]);
        }
        config.models.retain(|model| model.name == named.name);
        board.say(format!("fetching {}", named.name));
        fetch_models(&mut config).await?;
        config.nats.url = NatsUrl::Url(service.url().to_string());
        board.say(format!("starting the service and loading {}", named.name));
        let roles = Roles { preprocess: true, schedule: true, execute: true };
        let registry = Registry::new();
        let mut serving: LocalBoxFuture<'static, _> = Box::pin(compose::run(config, roles, registry.clone()));
        tokio::select! {
            ended = &mut serving => return Err(stopped(ended)),
            ready = service.wait_for(&named.name) => ready?,
        }
        Ok(Self { service, model: named.name, registry: Some(registry), serving: Some(serving) })
    }

    /// Waits until the actors of this process stop, which they should not; for ever if another process serves.
    pub async fn ended(&mut self) -> anyhow::Error {
        match &mut self.serving {
            Some(serving) => stopped(serving.await),
            None => futures::future::pending().await,
        }
    }

    /// Leaves the service, or ends it with its server.
    pub async fn close(mut self) {
        if let Some(serving) = &mut self.serving {
            tokio::select! {
                _ = serving => {}
                () = self.service.settle() => {}
            }
        }
        drop(self.serving);
        self.service.close().await;
    }
}

fn stopped(ended: anyhow::Result<ExitCode>) -> anyhow::Error {
    match ended {
        Ok(_) => unavailable("the service in this process ended early; its log says why (MILLRACE_LOG=info)"),
        Err(error) => error.context("the service in this process cannot run"),
    }
}

struct Named {
    name: ModelName,
    arg: Option<ModelArg>,
}

/// What `--model` means: a served or configured name, or a folder or repository to serve.
fn named(model: Option<&str>, config: &Config, remote: bool) -> anyhow::Result<Named> {
    let Some(text) = model else {
        let default = config.default_model();
        let default = default.ok_or_else(|| usage("no model: give --model, or add [[models]] to pipeline.toml"))?;
        return Ok(Named { name: default.name.clone(), arg: None });
    };
    let configured = ModelName::new(text).ok().filter(|name| remote || config.model(name).is_some());
    if let Some(name) = configured.filter(|_| !Path::new(text).is_dir()) {
        return Ok(Named { name, arg: None });
    }
    let arg = parse_models(&[text.to_string()])?.swap_remove(0);
    Ok(Named { name: arg.name.clone(), arg: Some(arg) })
}
