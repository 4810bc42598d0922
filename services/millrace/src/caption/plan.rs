//! From an opened file to its windows. The upload is left to the first job that needs it.

use std::path::Path;

use tokio::sync::OnceCell;

use super::input::Input;
use super::job::{Carrier, fits_inline};
use super::kind::MediaKind;
use super::probe::duration_secs;
use super::window::{Window, windows};

/// A file with its windows: one job each.
pub struct FilePlan {
    /// The file.
    pub input: Input,
    /// Its windows; `None` stands for the whole file (a still, or a video whose container gives no duration).
    pub windows: Vec<Option<Window>>,
    /// Where the jobs find the bytes, once the first of them has seen to it.
    pub carrier: OnceCell<Carrier>,
}

impl FilePlan {
    /// Whether the file travels inside its jobs.
    pub fn inline(&self) -> bool {
        fits_inline(self.input.size_bytes, self.windows.len())
    }
}

/// Plans `input` in windows of `window_secs`.
///
/// # Errors
/// As [`duration_secs`].
pub async fn plan(input: Input, ffprobe: &Path, window_secs: f64) -> anyhow::Result<FilePlan> {
    let windows = match input.kind {
        MediaKind::Image(_) => vec![None],
        MediaKind::Video(_) => match duration_secs(ffprobe, &input.path, &input.name).await? {
            Some(duration_secs) => windows(duration_secs, window_secs).into_iter().map(Some).collect(),
            None => vec![None],
        },
    };
    Ok(FilePlan { input, windows, carrier: OnceCell::new() })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    async fn planned(folder: &Path, name: &str, source: &str, window_secs: f64) -> FilePlan {
        let path = folder.join(name).to_string_lossy().into_owned();
        let made = Command::new("ffmpeg")
            .args(["-v", "error", "-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-y", &path])
            .status()
            .unwrap();
        assert!(made.success());
        let input = Input::open(&path, u64::MAX, &mut std::io::empty()).unwrap();
        plan(input, Path::new("ffprobe"), window_secs).await.unwrap()
    }

    #[tokio::test]
    async fn real_files_of_each_kind_are_cut_by_their_duration() {
        let folder = tempfile::tempdir().unwrap();
        for (name, media_type) in [("a.mp4", "video/mp4"), ("a.mkv", "video/x-matroska"), ("a.webm", "video/webm")] {
            let plan = planned(folder.path(), name, "testsrc=duration=5:size=64x48:rate=8", 2.0).await;
            assert_eq!(plan.input.kind, MediaKind::Video(media_type));
            assert_eq!(plan.windows.len(), 3, "{name}: {:?}", plan.windows);
            assert!(plan.inline());
        }
        let still = planned(folder.path(), "a.png", "color=red:size=16x16:rate=1:duration=1", 2.0).await;
        assert_eq!((still.input.kind, still.windows), (MediaKind::Image("image/png"), vec![None]));
    }
}
