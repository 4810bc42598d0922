//! `millrace caption`: files in, captions out. Plans one job per window, publishes a bounded number at once, and hands
//! what comes back to the view. Kinds, windows, jobs and text are in `crate::caption`.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use futures::StreamExt;
use millrace_config::Config;
use millrace_protocol::Class;
use millrace_protocol::job::MAX_PRIORITY;
use millrace_runtime::Clock;

use super::settings::SettingsArgs;
use crate::caption::input::Input;
use crate::caption::job::Wishes;
use crate::caption::plan::{FilePlan, plan};
use crate::caption::progress::Board;
use crate::caption::run::{Event, WindowJob, events};
use crate::caption::view::View;
use crate::exit::{self, usage};
use crate::service::Service;
use crate::session::Session;
use crate::signals::StopSignals;

/// Windows in work at once: enough to fill a batch, few enough that the first captions come first.
const IN_FLIGHT: usize = 16;

/// Options of `millrace caption`.
#[derive(Debug, clap::Args)]
pub struct CaptionArgs {
    /// Files to caption (MP4, MKV, WebM, GIF, JPEG, PNG, WebP); `-` is standard input
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<String>,
    /// Model: a folder, a Hugging Face repository, or the name of one that is being served
    #[arg(long, value_name = "DIR|OWNER/REPO|NAME")]
    pub model: Option<String>,
    /// What to ask [default: "Describe the video." or "Describe the image."]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Seconds of video per caption; 0 captions each file as a whole
    #[arg(long, value_name = "SECS", default_value_t = 8.0, value_parser = seconds)]
    pub window: f64,
    /// Frames sampled per second of video [default: the model's]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub fps: Option<f64>,
    /// Longest caption, in tokens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// 0 (lowest) to 9
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=i64::from(MAX_PRIORITY)))]
    pub priority: Option<u8>,
    /// Give up on captions that are not there after so many seconds
    #[arg(long, value_name = "SECS", value_parser = rate)]
    pub deadline: Option<f64>,
    /// `interactive` streams every token; `batch` yields to those who wait
    #[arg(long, value_name = "CLASS", default_value = "interactive", value_parser = class)]
    pub class: Class,
    /// One JSON object per caption on standard output
    #[arg(long)]
    pub json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let secs: f64 = text.parse().map_err(|_| "not a number of seconds".to_string())?;
    if secs.is_finite() && secs >= 0.0 { Ok(secs) } else { Err("must be 0 or more".to_string()) }
}

fn rate(text: &str) -> Result<f64, String> {
    seconds(text).and_then(|value| if value > 0.0 { Ok(value) } else { Err("must be above 0".to_string()) })
}

pub(super) fn class(text: &str) -> Result<Class, String> {
    Class::from_token(text).ok_or_else(|| "one of interactive, batch, stream".to_string())
}

/// Captions the files.
///
/// # Errors
/// Usage faults (64) if no file can be captioned, an unavailable service (69). Failed captions are not errors here:
/// they are printed, and the exit code is 1.
pub async fn run(settings: &SettingsArgs, args: CaptionArgs) -> anyhow::Result<ExitCode> {
    let config = settings.load()?;
    let clock = Clock::system();
    let (plans, unreadable) = open_all(&args, &config).await?;

    let board = Board::new(clock.clone(), !std::io::stderr().is_terminal());
    let mut signals = StopSignals::listen()?;
    let mut session = tokio::select! {
        session = Session::open(settings, config, args.model.as_deref(), &board) => session?,
        () = signals.next() => return Ok(ExitCode::from(exit::INTERRUPTED)),
    };
    let wishes = Wishes {
        model: session.model.clone(),
        prompt: args.prompt.clone(),
        fps: args.fps,
        max_tokens: args.max_tokens,
        priority: args.priority,
        deadline_unix_ms: args.deadline.map(|secs| clock.unix_ms().saturating_add(millis(secs))),
    };
    let mut view = View::new(board, args.json, args.paths.len() > 1);
    let service = session.service.clone();
    let code = tokio::select! {
        code = caption_all(&service, &plans, &wishes, args.class, &clock, &mut view) => code?,
        fault = session.ended() => return Err(fault),
        () = signals.next() => {
            view.cancel(&service).await;
            ExitCode::from(exit::INTERRUPTED)
        }
    };
    let all_done = view.close()?;
    session.close().await;
    Ok(if code == ExitCode::SUCCESS && !(all_done && unreadable == 0) { ExitCode::from(exit::FAILED) } else { code })
}

fn millis(secs: f64) -> u64 {
    u64::try_from(Duration::try_from_secs_f64(secs).unwrap_or(Duration::MAX).as_millis()).unwrap_or(u64::MAX)
}

/// Opens and plans every file. A file that cannot be captioned is reported and left out; their number comes back.
async fn open_all(args: &CaptionArgs, config: &Config) -> anyhow::Result<(Vec<FilePlan>, usize)> {
    if args.paths.iter().filter(|path| *path == "-").count() > 1 {
        return Err(usage("`-` can be given once: standard input can be read only once"));
    }
    let limit_bytes = config.preprocess.limits.max_video_bytes.min(config.streams.media_max_bytes);
    let mut plans = Vec::new();
    let mut faults = Vec::new();
    for path in &args.paths {
        let planned = match Input::open(path, limit_bytes, &mut std::io::stdin().lock()) {
            Ok(input) => plan(input, &config.preprocess.ffprobe, args.window).await,
            Err(fault) => Err(fault),
        };
        match planned {
            Ok(planned) => plans.push(planned),
            Err(fault) => faults.push(fault),
        }
    }
    if plans.is_empty() && faults.len() == 1 {
        return Err(faults.swap_remove(0));
    }
    for fault in &faults {
        eprintln!("millrace: {fault:#}");
    }
    if plans.is_empty() { Err(usage("none of the files can be captioned")) } else { Ok((plans, faults.len())) }
}

async fn caption_all(
    service: &Service,
    plans: &[FilePlan],
    wishes: &Wishes,
    class: Class,
    clock: &Clock,
    view: &mut View,
) -> anyhow::Result<ExitCode> {
    let jobs = WindowJob::number(plans, &crate::caption::run::fresh_prefix(clock))?;
    view.expect(&jobs);
    let uploads = view.uploads();
    let streams = futures::stream::iter(jobs).map(|job| events(service, job, wishes, class, &uploads));
    let mut running = streams.flatten_unordered(Some(IN_FLIGHT));
    while let Some(event) = running.next().await {
        match event {
            Event::Started(number) => view.start(number),
            Event::Delta { number, text, tokens } => view.grow(number, &text, tokens),
            Event::Ended { number, last } => view.end(number, *last)?,
        }
    }
    Ok(ExitCode::SUCCESS)
}
