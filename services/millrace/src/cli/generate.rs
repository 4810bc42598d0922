//! `millrace generate`: one answer in this process, without NATS. What tests, users and bug reports use.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use millrace_config::PatchForm;
use millrace_executor::{Dtype, KvBudget, LoadOptions};
use millrace_preprocess::PrepareLimits;
use millrace_protocol::{ActorId, PageDtype, Sampling};
use millrace_runtime::Clock;

use super::settings::{SettingsArgs, fetch_models, parse_models, replace_models};
use crate::device::device_kind;
use crate::exit::usage;
use crate::generate::output::write_logits;
use crate::generate::request::{MediaFlags, Prompt, request};
use crate::generate::run;
use crate::prepare_limits::prepare_limits;

/// Options of `millrace generate`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["prompt", "messages", "ids"]))]
pub struct GenerateArgs {
    /// Model: a folder or a Hugging Face repository [default: the configured default]
    #[arg(long, value_name = "DIR|OWNER/REPO")]
    pub model: Option<String>,
    /// A user's message, rendered by the model's chat template
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Tokenise --prompt as it is, without the chat template
    #[arg(long, requires = "prompt")]
    pub raw: bool,
    /// JSON file with a list of messages, or a job document
    #[arg(long, value_name = "FILE")]
    pub messages: Option<PathBuf>,
    /// Token ids, used as they are; placeholders in them are filled by the media in order
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    pub ids: Option<Vec<u32>>,
    /// An image (may be repeated)
    #[arg(long, value_name = "FILE")]
    pub image: Vec<String>,
    /// A video (may be repeated)
    #[arg(long, value_name = "FILE")]
    pub video: Vec<String>,
    /// Frames of a video, already decoded, used as they are (may be repeated, each with its --fps)
    #[arg(long, value_name = "F1,F2,...", requires = "fps")]
    pub frames: Vec<String>,
    /// Frames per second: of each --frames in order (one serves all), or to sample from --video
    #[arg(long, value_name = "RATE")]
    pub fps: Vec<f64>,
    /// Longest answer, in tokens [default: the model's]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// Always take the likeliest token
    #[arg(long)]
    pub greedy: bool,
    /// Makes random draws repeatable
    #[arg(long, value_name = "N", conflicts_with = "greedy")]
    pub seed: Option<u64>,
    /// Go on past end-of-text tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// Report the K likeliest tokens beside each drawn one (with --json)
    #[arg(long, value_name = "K", requires = "json")]
    pub logprobs: Option<u32>,
    /// Write the logits of every position
    #[arg(long, value_name = "FILE.safetensors")]
    pub dump_logits: Option<PathBuf>,
    /// Precision of weights and activations [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_name = "DTYPE", value_parser = ["f32", "bf16"])]
    pub dtype: Option<String>,
    /// Where to compute: cpu, cuda, cuda:N, or auto for the first CUDA device that works and else the CPU
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// One JSON object as the last line
    #[arg(long)]
    pub json: bool,
}

/// Generates.
///
/// # Errors
/// Usage faults for everything about the model and the job, others for the engine.
pub async fn run(settings: &SettingsArgs, args: GenerateArgs) -> anyhow::Result<ExitCode> {
    let device = device_kind(
        millrace_config::DeviceChoice::parse(&args.device).map_err(|what| usage(format!("--device: {what}")))?,
    );
    let mut config = settings.load()?;
    let models = parse_models(&args.model.clone().into_iter().collect::<Vec<_>>())?;
    replace_models(&mut config, &models);
    let default = config.default_model().cloned();
    config.models = Vec::from_iter(default);
    fetch_models(&mut config).await?;
    let model = config.models.first().ok_or_else(|| usage("no model: give --model"))?;
    let folder = PathBuf::from(&model.path);

    let clock = Clock::system();
    let bf16 = match args.dtype.as_deref() {
        Some(dtype) => dtype == "bf16",
        None => device.default_dtype() == Dtype::Bf16,
    };
    let page = match config.preprocess.patches {
        PatchForm::Bytes => PageDtype::U8,
        PatchForm::Normalised if bf16 => PageDtype::Bf16,
        PatchForm::Normalised => PageDtype::F32,
    };
    let limits = PrepareLimits { dtype: Some(page), ..prepare_limits(&config) };
    let ids =
        args.ids.as_deref().filter(|_| !(args.image.is_empty() && args.video.is_empty() && args.frames.is_empty()));
    let mut job = request(&prompt(&args)?, &media(&args)?, &sampling(&args))?;
    job.max_tokens = args.max_tokens.or(job.max_tokens);
    job.ignore_eos |= args.ignore_eos;
    let plan = run::prepare(&folder, limits, &job, ids, &clock).await?;
    let options = LoadOptions {
        device,
        dtype: if bf16 { Dtype::Bf16 } else { Dtype::F32 },
        kv: config.executor.kv_bytes.map_or(KvBudget::Auto, KvBudget::Bytes),
        step_tokens: config.executor.step_tokens,
        step_patches: config.executor.step_patches,
        block_tokens: config.executor.block_tokens,
        slots: 1,
        keep_logits: args.dump_logits.is_some(),
        ..LoadOptions::in_process(model.name.clone(), ActorId::new("generate")?)
    };

    let quiet = args.json;
    let work = tokio::task::spawn_blocking(move || {
        run::run(&folder, &options, plan, &clock, &mut |text| {
            if !quiet {
                let mut out = std::io::stdout().lock();
                // A reader that went away is noticed at the last line.
                let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            }
        })
    });
    let (answer, logits) = work.await??;
    if let Some(path) = &args.dump_logits {
        write_logits(path, logits)?;
    }
    let last = if args.json { serde_json::to_string(&answer)? } else { String::new() };
    writeln!(std::io::stdout().lock(), "{last}")?;
    Ok(ExitCode::SUCCESS)
}

fn prompt(args: &GenerateArgs) -> anyhow::Result<Prompt> {
    if let Some(path) = &args.messages {
        let text = std::fs::read_to_string(path).map_err(|error| usage(format!("{}: {error}", path.display())))?;
        return Ok(Prompt::Messages(text));
    }
    Ok(match (&args.prompt, &args.ids) {
        (Some(text), _) if args.raw => Prompt::Raw(text.clone()),
        (Some(text), _) => Prompt::Chat(text.clone()),
        (None, ids) => Prompt::Ids(ids.clone().unwrap_or_default()),
    })
}

fn media(args: &GenerateArgs) -> anyhow::Result<MediaFlags> {
    let clips = args.frames.len();
    if args.fps.len() > clips.max(1) || (args.fps.len() > 1 && args.fps.len() != clips) {
        return Err(usage(format!("{} --fps for {clips} --frames: give one for each, or one for all", args.fps.len())));
    }
    let frames = args.frames.iter().zip(args.fps.iter().cycle());
    Ok(MediaFlags {
        images: args.image.clone(),
        videos: args.video.clone(),
        frames: frames.map(|(list, fps)| (list.split(',').map(str::to_owned).collect(), *fps)).collect(),
        sample_fps: args.fps.first().copied().filter(|_| clips == 0),
    })
}

fn sampling(args: &GenerateArgs) -> Sampling {
    Sampling {
        temperature: args.greedy.then_some(0.0),
        seed: args.seed,
        logprobs: args.logprobs,
        ..Sampling::default()
    }
}
