//! A video file to normalised patches: ffmpeg decodes in order to a pipe, the sampled frames go through the fused
//! resize one at a time, the others are dropped as they come. So a job never holds more than one decoded frame.
//!
//! Times in the prompt count from the window's start, as if the clip had been cut there.

use std::path::Path;

use millrace_protocol::{ErrorCode, JobError};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::process::Command;

use crate::frames::{FrameWriter, VideoPatches};
use crate::limits::PrepareLimits;
use crate::processor_config::VideoSettings;
use crate::video_probe::{VideoInfo, broken_program, demuxer, file_url, probe, read_up_to, spawn, undecodable};
use crate::video_sampling::{sample_indices, timestamp_texts};

/// Share of frames with errors above which ffmpeg fails.
const ERROR_RATE: &str = "0.02";

/// Part of a video and how densely it is sampled.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Window {
    /// Start, in seconds from the first frame.
    pub start_secs: Option<f64>,
    /// End, exclusive.
    pub end_secs: Option<f64>,
    /// Frames sampled per second, instead of the checkpoint's.
    pub fps: Option<f64>,
}

impl Window {
    /// # Errors
    /// `invalid_value` naming the field.
    pub fn check(&self) -> Result<(), JobError> {
        let bad = |text: &str| Err(JobError::new(ErrorCode::InvalidValue, text));
        let times = [self.start_secs, self.end_secs].into_iter().flatten();
        if times.clone().any(|time| !time.is_finite() || time < 0.0) {
            return bad("start_secs and end_secs of a video must be numbers from 0 on");
        }
        if let (start, Some(end)) = (self.start_secs.unwrap_or(0.0), self.end_secs)
            && end <= start
        {
            return bad("end_secs of a video must be greater than start_secs");
        }
        match self.fps {
            Some(fps) if !(fps > 0.0 && fps <= 240.0) => bad("fps of a video must be above 0 and at most 240"),
            _ => Ok(()),
        }
    }

    /// Indices of the frames inside, as a range.
    fn frames(&self, times: &[f64]) -> std::ops::Range<usize> {
        let first = times.partition_point(|&time| time < self.start_secs.unwrap_or(0.0));
        let end = self.end_secs.map_or(times.len(), |end| times.partition_point(|&time| time < end));
        first..end.max(first)
    }
}

/// Decodes, samples, resizes, normalises and patchifies.
///
/// # Errors
/// `media_type`, `media_decode`, `too_large` or `invalid_value`; `internal` if ffmpeg itself is missing.
pub async fn decode_video(
    file: &Path,
    window: Window,
    settings: &VideoSettings,
    writer: impl Fn((u32, u32), u32) -> Result<FrameWriter, JobError> + Sync,
    limits: &PrepareLimits,
) -> Result<VideoPatches, JobError> {
    window.check()?;
    let work = async {
        let head = head(file).await?;
        let demuxer = demuxer(&head)?;
        let info = probe(file, demuxer, limits).await?;
        let range = window.frames(&info.times);
        if range.is_empty() {
            let length = info.times.last().copied().unwrap_or(0.0);
            let text = format!("no frame lies in the window; the video's last one is at {length:.3} seconds");
            return Err(JobError::new(ErrorCode::InvalidValue, text));
        }
        let mut total = range.len() as u32;
        // A second round only if the decoder shows fewer frames than the container has packets, and says nothing of it.
        for _ in 0..2 {
            let indices = sample_indices(total, info.fps, window.fps, settings);
            let mut frames = writer((info.height, info.width), indices.len() as u32)?;
            match decode(file, demuxer, &info, range.start, &indices, &mut frames, limits).await? {
                Shown::All => {
                    let times = timestamp_texts(&indices, info.fps, settings.pixels.temporal as usize);
                    return frames.finish(times);
                }
                Shown::Only(count) => total = (count as u32).saturating_sub(range.start as u32),
            }
            if total == 0 {
                break;
            }
        }
        Err(undecodable(b"its frames end before the window does"))
    };
    tokio::time::timeout(limits.video_time, work).await.unwrap_or_else(|_| {
        let text =
            format!("decoding the video took longer than {} seconds: send a shorter one", limits.video_time.as_secs());
        Err(JobError::new(ErrorCode::TooLarge, text))
    })
}

enum Shown {
    /// Every wanted frame came.
    All,
    /// The stream ended, in silence, after so many frames.
    Only(usize),
}

/// Runs ffmpeg once and hands the frames `first + indices` to `frames`.
async fn decode(
    file: &Path,
    demuxer: &str,
    info: &VideoInfo,
    first: usize,
    indices: &[u32],
    frames: &mut FrameWriter,
    limits: &PrepareLimits,
) -> Result<Shown, JobError> {
    let mut command = Command::new(&limits.ffmpeg);
    command.args(["-nostdin", "-v", "error", "-max_error_rate", ERROR_RATE, "-protocol_whitelist", "file,pipe"]);
    command.args(["-threads", "2", "-f", demuxer, "-i"]).arg(file_url(file));
    command.args(["-map", "0:V:0", "-fps_mode", "passthrough", "-s", &format!("{}x{}", info.width, info.height)]);
    command.args(["-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1"]);
    let mut child = spawn(&mut command)?;
    let Some(stdout) = child.stdout.take() else { return Err(broken_program("ffmpeg", &"no output pipe")) };
    let complaints = tokio::spawn(read_up_to(child.stderr.take(), 16 << 10));
    let frame_bytes = info.width as usize * info.height as usize * 3;
    let mut stdout = BufReader::with_capacity(1 << 16, stdout);
    let mut frame = vec![0u8; frame_bytes];
    let (mut seen, mut next) = (0usize, 0usize);
    while let Some(&wanted) = indices.get(next) {
        if stdout.read_exact(&mut frame).await.is_err() {
            break;
        }
        if seen == first + wanted as usize {
            frame = frames.write(frame).await?;
            next += 1;
        }
        seen += 1;
    }
    if next == indices.len() && first + indices.last().map_or(0, |&last| last as usize + 1) < info.times.len() {
        // The rest is not wanted; the child dies with its handle.
        return Ok(Shown::All);
    }
    drop(stdout);
    let status = child.wait().await.map_err(|error| broken_program("ffmpeg", &error))?;
    let complaints = complaints.await.unwrap_or_default();
    match (next == indices.len(), status.success()) {
        (true, true) => Ok(Shown::All),
        (false, true) if complaints.is_empty() && seen > first => Ok(Shown::Only(seen)),
        _ => Err(undecodable(&complaints)),
    }
}

/// The first bytes of a file.
async fn head(file: &Path) -> Result<Vec<u8>, JobError> {
    let missing =
        |error: std::io::Error| JobError::new(ErrorCode::MediaMissing, format!("the video cannot be read: {error}"));
    let file = tokio::fs::File::open(file).await.map_err(missing)?;
    let mut head = Vec::new();
    file.take(64).read_to_end(&mut head).await.map_err(missing)?;
    Ok(head)
}
