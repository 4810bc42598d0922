//! `millrace bench`: publishes jobs, reads every result, reports rates and percentiles. The measuring is `crate::bench`.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget};
use millrace_config::Config;
use millrace_executor::random_weights::{RandomOptions, write_random};
use millrace_preprocess::ModelFacts;
use millrace_protocol::{ActorId, Class, JobId, JobRequest, ModelName};
use millrace_runtime::Clock;
use millrace_telemetry::Registry;
use serde_json::{Map, Value, json};

use super::settings::{SettingsArgs, fetch_models, parse_models, replace_models};
use crate::bench::case::{Case, Media, clip_size, image_size};
use crate::bench::direct::Direct;
use crate::bench::measure::{Measured, Ready, through_nats};
use crate::bench::memory::Memory;
use crate::bench::report;
use crate::bench::steps::Snapshot;
use crate::bench::workload::{Draft, Numbers, Picture, draft};
use crate::caption::progress::Board;
use crate::caption::run::fresh_prefix;
use crate::compose::load_options;
use crate::exit::usage;
use crate::prepare_limits::prepare_limits;
use crate::session::Session;
use crate::stand_in::write_stand_in;

/// Vocabulary that is assumed for a model that another process serves.
const UNKNOWN_VOCABULARY: u32 = 32_000;

/// Options of `millrace bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Model: a folder, a Hugging Face repository, or the name of one that is being served
    #[arg(long, value_name = "DIR|OWNER/REPO|NAME", conflicts_with = "config")]
    pub model: Option<String>,
    /// Folder with a config.json, to be filled with random weights (with --random-weights)
    #[arg(long, value_name = "DIR", requires = "random_weights")]
    pub config: Option<PathBuf>,
    /// Write a checkpoint of random weights for --config first; it is removed afterwards
    #[arg(long, requires = "config")]
    pub random_weights: bool,
    /// Decoder layers of the random checkpoint [default: the config's]
    #[arg(long, value_name = "N", requires = "random_weights")]
    pub layers: Option<usize>,
    /// A list of cases instead of one: `vllm-cases` is the table this project is compared with
    #[arg(long, value_name = "SUITE", value_parser = ["vllm-cases"], conflicts_with_all = ["requests", "images", "clip"])]
    pub suite: Option<String>,
    /// Requests submitted at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub requests: u32,
    /// Prompt tokens of each request
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub input: u32,
    /// Tokens to generate for each request; 1 measures the prompt alone
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub output: u32,
    /// One image of that size in each request
    #[arg(long, value_name = "WxH", value_parser = image_size, conflicts_with = "clip")]
    pub images: Option<Media>,
    /// One clip in each request
    #[arg(long, value_name = "FRAMESxWxH", value_parser = clip_size)]
    pub clip: Option<Media>,
    /// Pictures as raw pixels, stored beforehand and named in the job, instead of JPEG inside it
    #[arg(long, conflicts_with = "no_nats")]
    pub raw: bool,
    /// The engine alone, in this process
    #[arg(long)]
    pub no_nats: bool,
    /// Service class: `interactive` streams every token
    #[arg(long, value_name = "CLASS", default_value = "interactive", value_parser = super::caption::class)]
    pub class: Class,
    /// Vocabulary to draw token ids from [default: the model's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(200..))]
    pub vocabulary: Option<u32>,
    /// The same seed gives the same requests
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Write the report to a file as well
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// The report as JSON on standard output
    #[arg(long)]
    pub json: bool,
}

/// Measures.
///
/// # Errors
/// Usage faults for the model and the options, an unavailable service, a job that does not end well.
pub async fn run(settings: &SettingsArgs, args: BenchArgs) -> anyhow::Result<ExitCode> {
    // Here --config is a model's; pipeline.toml comes from its usual place.
    let settings = &SettingsArgs { config: None, nats: settings.nats.clone() };
    let mut config = settings.load()?;
    let temporary = match &args.config {
        Some(folder) => Some(random_checkpoint(folder, args.layers, args.seed).await?),
        None => None,
    };
    let model = temporary.as_ref().map(|folder| folder.path().display().to_string()).or_else(|| args.model.clone());
    let clock = Clock::system();
    let started = clock.now();
    let mut target = if args.no_nats {
        replace_models(&mut config, &parse_models(&model.into_iter().collect::<Vec<_>>())?);
        fetch_models(&mut config).await?;
        Target::engine(&config)?
    } else {
        let mut board = Board::new(clock.clone(), !std::io::stderr().is_terminal());
        let session = Session::open(settings, config.clone(), model.as_deref(), &board).await?;
        board.close();
        Target::Service(Box::new(session))
    };
    let init = clock.now().saturating_duration_since(started).as_secs_f64();
    let facts = model_folder(&config, model_name(&target), args.model.as_deref(), temporary.as_ref().map(|t| t.path()));
    let facts = facts.and_then(|folder| ModelFacts::load(&folder).ok());
    let vocabulary = args.vocabulary.or(facts.as_ref().map(|facts| facts.vocab)).unwrap_or(UNKNOWN_VOCABULARY);
    let vision = facts.is_some_and(|facts| facts.vision.is_some());

    let mut report = Map::new();
    let named = args.config.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    report.insert("model".into(), json!(named.unwrap_or_else(|| model_name(&target).to_string())));
    report.insert("engine".into(), json!(format!("millrace {}", env!("CARGO_PKG_VERSION"))));
    report.insert("path".into(), json!(if args.no_nats { "in-process" } else { "nats" }));
    report.insert("machine".into(), machine());
    report.insert("init_s".into(), json!((init * 10.0).round() / 10.0));
    let mut run =
        Run { args: &args, target: &mut target, vocabulary, numbers: Numbers::new(args.seed), clock, jobs: 0 };
    for case in cases(&args, vision) {
        let row = run.case(&case).await.with_context(|| case.key())?;
        if !args.json {
            writeln!(std::io::stdout().lock(), "{}", report::line(&case, &row))?;
        }
        report.insert(case.key(), row);
    }
    target.close().await;
    let text = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &args.out {
        std::fs::write(path, format!("{text}\n")).with_context(|| format!("--out {}", path.display()))?;
    }
    if args.json {
        writeln!(std::io::stdout().lock(), "{text}")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn cases(args: &BenchArgs, vision: bool) -> Vec<Case> {
    if args.suite.is_some() {
        return Case::vllm_suite(vision);
    }
    let media = args.images.or(args.clip).unwrap_or(Media::None);
    vec![Case { requests: args.requests as usize, input: args.input as usize, output: args.output, media }]
}

async fn random_checkpoint(config: &Path, layers: Option<usize>, seed: u64) -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    super::random_weights::copy_others(config, folder.path())
        .map_err(|error| usage(format!("--config {}: {error}", config.display())))?;
    let (from, to) = (config.to_path_buf(), folder.path().to_path_buf());
    let written = tokio::task::spawn_blocking(move || write_random(&from, &to, &RandomOptions { layers, seed }));
    written.await?.map_err(|error| usage(error.to_string()))?;
    write_stand_in(folder.path())?;
    Ok(folder)
}

/// Folder of the model's files, if they are on this machine.
fn model_folder(config: &Config, name: &ModelName, model: Option<&str>, made: Option<&Path>) -> Option<PathBuf> {
    let given = made.map(Path::to_path_buf).or_else(|| model.map(PathBuf::from));
    let configured = config.model(name).map(|model| PathBuf::from(&model.path));
    given.into_iter().chain(configured).find(|folder| folder.is_dir())
}

/// The processor and how many of them, for whoever reads the report elsewhere.
fn machine() -> Value {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = processor.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    json!({ "processor": name.trim_start_matches([' ', '\t', ':']), "cores": cores })
}

/// What answers.
enum Target {
    Service(Box<Session>),
    Engine(Box<Direct>, ModelName),
}

impl Target {
    fn engine(config: &Config) -> anyhow::Result<Self> {
        let model = config.default_model().ok_or_else(|| usage("no model: give --model or --config"))?;
        let options = load_options(&config.executor, model, ActorId::new("bench")?);
        let direct = Direct::load(Path::new(&model.path), prepare_limits(config), options)?;
        Ok(Self::Engine(Box::new(direct), model.name.clone()))
    }

    async fn close(self) {
        if let Self::Service(session) = self {
            session.close().await;
        }
    }
}

fn model_name(target: &Target) -> &ModelName {
    match target {
        Target::Service(session) => &session.model,
        Target::Engine(_, name) => name,
    }
}

struct Run<'a> {
    args: &'a BenchArgs,
    target: &'a mut Target,
    vocabulary: u32,
    numbers: Numbers,
    clock: Clock,
    jobs: usize,
}

impl Run<'_> {
    /// Warms up, measures, keeps the better of two runs where the baselines do.
    async fn case(&mut self, case: &Case) -> anyhow::Result<Value> {
        self.once(&case.warm_up()).await?;
        let mut best: Option<(Measured, Value)> = None;
        for _ in 0..if case.best_of_two() { 2 } else { 1 } {
            let (before, memory) = (self.snapshot(), self.memory());
            let begun = self.registry().cloned().zip(before.clone());
            let begun = begun.map(|(registry, before)| tokio::spawn(Snapshot::begun(registry, before)));
            let measured = self.once(case).await?;
            let begun = match begun {
                Some(task) if task.is_finished() => task.await.ok(),
                Some(task) => {
                    task.abort();
                    None
                }
                None => None,
            };
            let steps = self.snapshot().zip(before).and_then(|(now, before)| {
                let begun = begun.unwrap_or_else(|| before.clone());
                now.since(&before, &begun)
            });
            let memory = memory.zip(self.memory()).map(|(before, now)| before.until(now));
            let row = report::row(case, &measured, steps.as_ref(), memory.as_ref());
            if best.as_ref().is_none_or(|(best, _)| measured.seconds < best.seconds) {
                best = Some((measured, row));
            }
        }
        best.map(|(_, row)| row).context("nothing was measured")
    }

    fn snapshot(&self) -> Option<Snapshot> {
        self.registry().map(Snapshot::of)
    }

    /// Metrics of the executor, if it runs in this process.
    fn registry(&self) -> Option<&Registry> {
        match &*self.target {
            Target::Service(session) => session.registry.as_ref(),
            Target::Engine(..) => None,
        }
    }

    fn memory(&self) -> Option<Memory> {
        match &*self.target {
            Target::Service(session) => session.registry.as_ref().and_then(Memory::of),
            Target::Engine(direct, _) => Memory::of(&direct.registry),
        }
    }

    async fn once(&mut self, case: &Case) -> anyhow::Result<Measured> {
        let drafts = (0..case.requests)
            .map(|_| draft(case, &mut self.numbers, self.vocabulary, self.args.raw))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let prefix = fresh_prefix(&self.clock).replace("caption", "bench");
        let first = self.jobs;
        self.jobs += drafts.len();
        match self.target {
            Target::Engine(direct, _) => {
                let jobs: Vec<JobRequest> = drafts.iter().map(|draft| draft.request(&[])).collect();
                direct.run(&jobs, &self.clock).await
            }
            Target::Service(session) => {
                let mut jobs = Vec::with_capacity(drafts.len());
                for (number, draft) in (first..).zip(drafts) {
                    let stored = store(session, &draft, &format!("{prefix}-{number}")).await?;
                    let document = serde_json::to_vec(&draft.request(&stored))?;
                    jobs.push(Ready { job: JobId::new(format!("{prefix}-{number}"))?, document });
                }
                let bar = bar(jobs.len(), &case.key());
                let mut done = |count: usize| bar.set_position(count as u64);
                let (service, model) = (session.service.clone(), session.model.clone());
                let run = through_nats(&service, self.args.class, &model, jobs, &self.clock, &mut done);
                let measured = tokio::select! {
                    measured = run => measured,
                    fault = session.ended() => Err(fault),
                };
                bar.finish_and_clear();
                measured
            }
        }
    }
}

/// Stores raw pictures; their names.
async fn store(session: &Session, draft: &Draft, prefix: &str) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for (number, picture) in draft.pictures.iter().enumerate() {
        if let Picture::Raw { pixels, .. } = picture {
            let name = format!("{prefix}-{number}");
            session.service.bus().object_put(&name, &mut pixels.as_slice()).await?;
            names.push(name);
        }
    }
    Ok(names)
}

fn bar(requests: usize, key: &str) -> ProgressBar {
    let shown = std::io::stderr().is_terminal();
    let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    ProgressBar::with_draw_target(Some(requests as u64), target).with_message(key.to_owned())
}
