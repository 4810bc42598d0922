//! What pipeline.toml says about preprocessing, as the preprocessing crate takes it.

use millrace_config::{Config, DeviceChoice, Dtype, PatchForm, VideoPrompt};
use millrace_preprocess::PrepareLimits;
use millrace_protocol::PageDtype;

/// The limits of `[preprocess]`, with the element type that `[executor] dtype` asks for on this device, or bytes.
pub fn prepare_limits(config: &Config) -> PrepareLimits {
    let settings = &config.preprocess;
    PrepareLimits {
        image_bytes: settings.limits.max_image_bytes,
        image_pixels: settings.limits.max_image_pixels,
        video_bytes: settings.limits.max_video_bytes,
        video_frames: settings.limits.max_frames,
        video_time: settings.limits.decode_timeout,
        default_max_tokens: config.scheduler.default_max_tokens,
        file_roots: settings.file_roots.clone(),
        nested_video: settings.video_prompt == VideoPrompt::Nested,
        dtype: match config.executor.dtype {
            _ if settings.patches == PatchForm::Bytes => Some(PageDtype::U8),
            Dtype::Bf16 => Some(PageDtype::Bf16),
            Dtype::F32 => Some(PageDtype::F32),
            Dtype::Auto => match config.executor.device {
                DeviceChoice::Cuda(_) => Some(PageDtype::Bf16),
                // Which device an executor elsewhere has is not known here; it rounds for itself.
                DeviceChoice::Cpu | DeviceChoice::Auto => Some(PageDtype::F32),
            },
        },
        ffmpeg: settings.ffmpeg.clone(),
        ffprobe: settings.ffprobe.clone(),
        ..PrepareLimits::default()
    }
}
