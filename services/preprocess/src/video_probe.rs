//! What a video file holds, asked of ffprobe: size as shown, frame rate, and the time of every frame.
//!
//! The reference samples by the number of frames a file has; packets that the container marks as not shown do not
//! count. The demuxer is chosen here from the first bytes, so that a file cannot select one that opens others.

use std::path::Path;
use std::process::Stdio;

use millrace_protocol::{ErrorCode, JobError};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use crate::limits::PrepareLimits;
use crate::video_sampling::DEFAULT_FPS;

/// Bytes of ffprobe's answer per frame, more than it ever writes, and for the rest of it.
const ANSWER_FRAME_BYTES: u64 = 160;
const ANSWER_BASE_BYTES: u64 = 64 << 10;
/// Most of a child's complaints that are kept.
const COMPLAINT_BYTES: u64 = 16 << 10;

/// A video stream.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VideoInfo {
    /// Pixels in a row, as shown.
    pub(crate) width: u32,
    /// Rows, as shown.
    pub(crate) height: u32,
    /// Mean frames per second.
    pub(crate) fps: f64,
    /// Time of each frame in seconds from the first, ascending.
    pub(crate) times: Vec<f64>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    packets: Vec<Packet>,
    #[serde(default)]
    streams: Vec<Stream>,
}

#[derive(Deserialize)]
struct Packet {
    pts_time: Option<String>,
    #[serde(default)]
    flags: String,
}

#[derive(Deserialize)]
struct Stream {
    width: Option<u32>,
    height: Option<u32>,
    avg_frame_rate: Option<String>,
    r_frame_rate: Option<String>,
    nb_frames: Option<String>,
    #[serde(default)]
    side_data_list: Vec<SideData>,
}

#[derive(Deserialize)]
struct SideData {
    rotation: Option<f64>,
}

/// Name of ffmpeg's demuxer for the file's first bytes.
pub(crate) fn demuxer(head: &[u8]) -> Result<&'static str, JobError> {
    match head {
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => Ok("mov"),
        [0x1A, 0x45, 0xDF, 0xA3, ..] => Ok("matroska"),
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Ok("gif"),
        [] => Err(JobError::new(ErrorCode::MediaDecode, "the video is empty: send its bytes")),
        _ => {
            let text = "the bytes are not a video that is taken here: send MP4, MKV, WebM or GIF; stills go in a part of type `image`";
            Err(JobError::new(ErrorCode::MediaType, text))
        }
    }
}

/// Asks ffprobe about the first video stream of `file`.
pub(crate) async fn probe(file: &Path, demuxer: &str, limits: &PrepareLimits) -> Result<VideoInfo, JobError> {
    let entries =
        "stream=width,height,avg_frame_rate,r_frame_rate,nb_frames:stream_side_data=rotation:packet=pts_time,flags";
    let mut command = Command::new(&limits.ffprobe);
    command.args(["-v", "error", "-protocol_whitelist", "file", "-f", demuxer, "-select_streams", "V:0"]);
    command.args(["-show_entries", entries, "-of", "json", "-i"]).arg(file_url(file));
    let mut child = spawn(&mut command)?;
    let most = ANSWER_BASE_BYTES + ANSWER_FRAME_BYTES * (u64::from(limits.video_frames) + 1);
    let complaints = tokio::spawn(read_up_to(child.stderr.take(), COMPLAINT_BYTES));
    let answer = read_up_to(child.stdout.take(), most).await;
    if answer.len() as u64 >= most {
        return Err(too_many_frames(limits));
    }
    let status = child.wait().await.map_err(|error| broken_program("ffprobe", &error))?;
    if !status.success() {
        return Err(undecodable(&complaints.await.unwrap_or_default()));
    }
    let answer: Answer = serde_json::from_slice(&answer).map_err(|error| broken_program("ffprobe", &error))?;
    read_answer(answer, limits)
}

fn read_answer(answer: Answer, limits: &PrepareLimits) -> Result<VideoInfo, JobError> {
    let Some(stream) = answer.streams.first() else {
        let text = "the file has no video stream: send a file with moving pictures";
        return Err(JobError::new(ErrorCode::MediaType, text));
    };
    let (Some(mut width @ 1..), Some(mut height @ 1..)) = (stream.width, stream.height) else {
        return Err(undecodable(b"no picture size"));
    };
    // ffmpeg turns the picture as the file asks; the sides change places at a quarter turn.
    let turns = stream.side_data_list.iter().find_map(|data| data.rotation).unwrap_or(0.0) / 90.0;
    if turns.round() as i64 % 2 != 0 {
        (width, height) = (height, width);
    }
    if u64::from(width) * u64::from(height) > limits.image_pixels {
        let text =
            format!("the video's frames have {width} x {height} pixels; at most {} are allowed", limits.image_pixels);
        return Err(JobError::new(ErrorCode::TooLarge, text));
    }
    let announced = stream.nb_frames.as_deref().and_then(|n| n.parse::<usize>().ok()).unwrap_or(0);
    if answer.packets.len() < announced {
        let text = format!(
            "the video is cut off: {} of {announced} frames are there; send the whole file",
            answer.packets.len()
        );
        return Err(JobError::new(ErrorCode::MediaDecode, text));
    }
    let rates = [&stream.avg_frame_rate, &stream.r_frame_rate];
    let fps = rates.into_iter().flatten().find_map(|text| rate(text)).unwrap_or(DEFAULT_FPS);
    let shown = answer.packets.iter().filter(|packet| !packet.flags.contains('D'));
    let time = |(index, packet): (usize, &Packet)| {
        let known = packet.pts_time.as_deref().and_then(|time| time.parse().ok()).filter(|time: &f64| time.is_finite());
        known.unwrap_or(index as f64 / fps)
    };
    let mut times: Vec<f64> = shown.enumerate().map(time).collect();
    times.sort_by(f64::total_cmp);
    let first = times.first().copied().ok_or_else(|| undecodable(b"it has no frames"))?;
    times.iter_mut().for_each(|time| *time -= first);
    if times.len() > limits.video_frames as usize {
        return Err(too_many_frames(limits));
    }
    Ok(VideoInfo { width, height, fps, times })
}

/// `30000/1001`; `None` for `0/0` and the like.
fn rate(text: &str) -> Option<f64> {
    let (numerator, denominator) = text.split_once('/')?;
    let rate = numerator.parse::<f64>().ok()? / denominator.parse::<f64>().ok()?;
    (rate.is_finite() && rate > 0.0).then_some(rate)
}

/// A path that no program takes for an option or another protocol.
pub(crate) fn file_url(file: &Path) -> std::ffi::OsString {
    let mut url = std::ffi::OsString::from("file:");
    url.push(file);
    url
}

/// Starts a child that dies with its handle.
pub(crate) fn spawn(command: &mut Command) -> Result<Child, JobError> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    command.spawn().map_err(|error| broken_program(&program, &error))
}

/// Reads to the end, but no more than `most` bytes: a child that writes on then gets a closed pipe.
pub(crate) async fn read_up_to(stream: Option<impl AsyncRead + Unpin>, most: u64) -> Vec<u8> {
    let mut kept = Vec::new();
    if let Some(stream) = stream {
        // A pipe that breaks shows in the child's exit status.
        let _ = stream.take(most).read_to_end(&mut kept).await;
    }
    kept
}

pub(crate) fn broken_program(program: &str, error: &dyn std::fmt::Display) -> JobError {
    let text = format!("{program} cannot be used: {error}; this is the service's fault, try again later");
    JobError::new(ErrorCode::Internal, text)
}

/// `media_decode` with the last of what the child said.
pub(crate) fn undecodable(complaints: &[u8]) -> JobError {
    let said = String::from_utf8_lossy(complaints);
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(3)..].join("; ");
    let tail: String = tail.chars().take(300).collect();
    JobError::new(ErrorCode::MediaDecode, format!("the video cannot be decoded ({tail}): send an intact file"))
}

fn too_many_frames(limits: &PrepareLimits) -> JobError {
    let text = format!("the video has more than {} frames: cut it into shorter jobs", limits.video_frames);
    JobError::new(ErrorCode::TooLarge, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_fractions() {
        assert_eq!(rate("30/1"), Some(30.0));
        assert_eq!(rate("30000/1001"), Some(30000.0 / 1001.0));
        assert_eq!((rate("0/0"), rate("1/0"), rate("x"), rate("-1/1")), (None, None, None, None));
    }

    #[test]
    fn the_first_bytes_choose_the_demuxer() {
        assert_eq!(demuxer(b"\0\0\0\x20ftypisom"), Ok("mov"));
        assert_eq!(demuxer(b"#EXTM3U\nfile:///etc/passwd").unwrap_err().code, ErrorCode::MediaType);
        assert_eq!(demuxer(b"").unwrap_err().code, ErrorCode::MediaDecode);
    }

    #[test]
    fn a_quarter_turn_swaps_the_sides_and_hidden_packets_do_not_count() {
        let text = r#"{"streams":[{"width":640,"height":480,"avg_frame_rate":"0/0","r_frame_rate":"5/1",
            "side_data_list":[{},{"rotation":-90}]}],
            "packets":[{"pts_time":"-1.0","flags":"_D"},{"pts_time":"0.4","flags":"K_"},{"pts_time":"0.2"},{}]}"#;
        let info = read_answer(serde_json::from_str(text).unwrap(), &PrepareLimits::default()).unwrap();
        assert_eq!((info.width, info.height, info.fps), (480, 640, 5.0));
        assert_eq!(info.times.len(), 3);
        assert_eq!(info.times[0], 0.0);
    }
}
