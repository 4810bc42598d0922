//! Asks ffprobe how long a video is, in a child process with a time limit. Decoding is the preprocess actor's.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use crate::exit::{unavailable, usage};

/// Longest that ffprobe may take: it reads headers only.
const TIME_LIMIT: Duration = Duration::from_secs(20);

#[derive(Deserialize)]
struct Probe {
    format: Option<Format>,
}

#[derive(Deserialize)]
struct Format {
    duration: Option<String>,
}

/// Duration of the video at `path` in seconds; `None` if its container does not say.
///
/// # Errors
/// A usage fault if ffprobe refuses the file, an unavailable one if `ffprobe` cannot be started.
pub async fn duration_secs(ffprobe: &Path, path: &Path, name: &str) -> anyhow::Result<Option<f64>> {
    let mut command = Command::new(ffprobe);
    command.args(["-v", "error", "-show_entries", "format=duration", "-of", "json", "-i"]).arg(path);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(TIME_LIMIT, command.output()).await {
        Err(_) => {
            return Err(usage(format!(
                "{name}: ffprobe took longer than {} s; is the file whole?",
                TIME_LIMIT.as_secs()
            )));
        }
        Ok(Err(error)) => {
            let program = ffprobe.display();
            return Err(unavailable(format!(
                "cannot start {program}: {error}; install ffmpeg or set its path in pipeline.toml"
            )));
        }
        Ok(Ok(output)) => output,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().lines().last().unwrap_or("no reason given").to_string();
        return Err(usage(format!("{name}: not a readable video: {said}")));
    }
    Ok(duration_in(&output.stdout))
}

/// Reads ffprobe's JSON. A duration that is missing, `N/A`, zero or negative is unknown.
fn duration_in(json: &[u8]) -> Option<f64> {
    let probe: Probe = serde_json::from_slice(json).ok()?;
    let secs: f64 = probe.format?.duration?.parse().ok()?;
    (secs.is_finite() && secs > 0.0).then_some(secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_read_or_unknown() {
        assert_eq!(duration_in(br#"{"format":{"duration":"2.000000"}}"#), Some(2.0));
        for unknown in
            [r#"{"format":{}}"#, r#"{"format":{"duration":"N/A"}}"#, r#"{"format":{"duration":"0.0"}}"#, "", "{}"]
        {
            assert_eq!(duration_in(unknown.as_bytes()), None, "{unknown}");
        }
    }

    #[tokio::test]
    async fn a_missing_program_and_a_broken_file_are_told_apart() {
        let broken = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(broken.path(), b"\0\0\0\x20ftypisom").unwrap();
        let missing = duration_secs(Path::new("/no/ffprobe"), broken.path(), "a.mp4").await.unwrap_err();
        assert!(missing.to_string().contains("install ffmpeg"), "{missing}");
        let refused = duration_secs(Path::new("ffprobe"), broken.path(), "a.mp4").await.unwrap_err();
        assert!(refused.to_string().starts_with("a.mp4: not a readable video"), "{refused}");
    }
}
