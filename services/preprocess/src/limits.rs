//! What one job may cost before it is refused, and where the child processes are. Plain values; configuration fills them.

use std::path::PathBuf;
use std::time::Duration;

use millrace_protocol::PageDtype;

/// Limits of preprocessing.
#[derive(Debug, Clone, PartialEq)]
pub struct PrepareLimits {
    /// Most bytes of an encoded image.
    pub image_bytes: u64,
    /// Most pixels of an image or a video frame, checked from the header before anything is allocated.
    pub image_pixels: u64,
    /// Most bytes of an encoded video.
    pub video_bytes: u64,
    /// Most frames of a video file, before sampling, or of a list of frames.
    pub video_frames: u32,
    /// Longest time that ffprobe and ffmpeg may take for one video, together.
    pub video_time: Duration,
    /// Most images and videos in a job.
    pub media_items: usize,
    /// Most bytes of finished patches in a job.
    pub patch_bytes: u64,
    /// Tokens to generate where neither the job nor the checkpoint says how many.
    pub default_max_tokens: u32,
    /// Lowers the model's longest sequence, in tokens.
    pub context_tokens: Option<u32>,
    /// Most stop texts in a job.
    pub stop_texts: usize,
    /// Most bytes of one stop text.
    pub stop_text_bytes: usize,
    /// Folders below which `file://` sources may be.
    pub file_roots: Vec<PathBuf>,
    /// Keeps the template's own `<|vision_start|>`/`<|vision_end|>` around a video, as transformers 5.17 does; older
    /// versions and most serving engines replace them.
    pub nested_video: bool,
    /// Element type of the patches; absent: the checkpoint's. Bytes are normalised on the device.
    pub dtype: Option<PageDtype>,
    /// The ffmpeg program.
    pub ffmpeg: PathBuf,
    /// The ffprobe program.
    pub ffprobe: PathBuf,
    /// Folder for videos on their way to ffmpeg.
    pub temp_folder: PathBuf,
}

impl Default for PrepareLimits {
    fn default() -> Self {
        Self {
            image_bytes: 64 << 20,
            image_pixels: 64_000_000,
            video_bytes: 1 << 30,
            video_frames: 100_000,
            video_time: Duration::from_secs(120),
            media_items: 64,
            patch_bytes: 2 << 30,
            default_max_tokens: 1024,
            context_tokens: None,
            stop_texts: 16,
            stop_text_bytes: 256,
            file_roots: Vec::new(),
            nested_video: true,
            dtype: None,
            ffmpeg: PathBuf::from("ffmpeg"),
            ffprobe: PathBuf::from("ffprobe"),
            temp_folder: PathBuf::from("/tmp"),
        }
    }
}
