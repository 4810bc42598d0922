//! Video files, made and decoded by the real ffmpeg.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use millrace_protocol::{ErrorCode, JobError};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::limits::PrepareLimits;
use crate::prepare::Prepared;
use crate::prepare_tests::{Bucket, prepare_with, preparer, raw};

const WIDTH: usize = 96;
const HEIGHT: usize = 64;

fn ffmpeg(arguments: &str) {
    let status =
        Command::new("ffmpeg").args(["-nostdin", "-v", "error", "-y"]).args(arguments.split_whitespace()).status();
    assert!(status.unwrap().success(), "{arguments}");
}

/// 25 frames of moving bars at 10 a second.
fn clip(folder: &Path, name: &str, options: &str) -> Vec<u8> {
    let path = folder.join(name);
    ffmpeg(&format!("-f lavfi -i testsrc=size={WIDTH}x{HEIGHT}:rate=10:duration=2.5 {options} {}", path.display()));
    std::fs::read(path).unwrap()
}

async fn caption(bytes: Vec<u8>, options: Json, limits: PrepareLimits) -> Result<Prepared, JobError> {
    let mut part = json!({"type": "video", "object": "clip"});
    part.as_object_mut().unwrap().extend(options.as_object().cloned().unwrap_or_default());
    let job = json!({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}]});
    prepare_with(&preparer(limits), &Bucket(vec![("clip", bytes)]), job).await
}

/// The same frames, decoded by a separate run of ffmpeg and sent as raw frames.
async fn as_frames(folder: &Path, name: &str, indices: &[usize], fps: f64) -> Prepared {
    let out = folder.join("frames.rgb");
    ffmpeg(&format!(
        "-i {} -f rawvideo -pix_fmt rgb24 -fps_mode passthrough {}",
        folder.join(name).display(),
        out.display()
    ));
    let pixels = std::fs::read(out).unwrap();
    let frames: Vec<&[u8]> = pixels.chunks_exact(WIDTH * HEIGHT * 3).collect();
    let chosen: Vec<Json> = indices.iter().map(|&i| raw(frames[i], HEIGHT, WIDTH)).collect();
    let times: Vec<usize> = indices.iter().map(|i| i - indices[0]).collect();
    let content = json!([{"type": "frames", "fps": fps, "frames": chosen, "indices": times}, {"type": "text", "text": "What happens?"}]);
    let job = json!({"messages": [{"role": "user", "content": content}]});
    prepare_with(&preparer(PrepareLimits::default()), &Bucket::default(), job).await.unwrap()
}

#[tokio::test]
async fn a_file_gives_the_sampled_frames() {
    let folder = TempDir::new().unwrap();
    for (name, options) in [("a.mp4", "-pix_fmt yuv420p"), ("a.mkv", "-pix_fmt yuv420p -bf 2"), ("a.gif", "")] {
        let bytes = clip(folder.path(), name, options);
        let got = caption(bytes, json!({}), PrepareLimits::default()).await.unwrap();
        // 25 frames at 10 a second, 2 sampled a second: int(5.0) evenly from 0 to 24.
        let expected = as_frames(folder.path(), name, &[0, 6, 12, 18, 24], 10.0).await;
        assert_eq!(got.prompt, expected.prompt, "{name}");
        assert!(got == expected, "{name}: patches differ");
    }
}

#[tokio::test]
async fn a_window_counts_from_its_start() {
    let folder = TempDir::new().unwrap();
    let bytes = clip(folder.path(), "a.mp4", "-pix_fmt yuv420p");
    let window = json!({"start_secs": 0.5, "end_secs": 1.5, "fps": 4.0});
    let got = caption(bytes.clone(), window, PrepareLimits::default()).await.unwrap();
    let expected = as_frames(folder.path(), "a.mp4", &[5, 8, 11, 14], 10.0).await;
    assert!(got == expected);
    let behind = caption(bytes.clone(), json!({"start_secs": 9.0}), PrepareLimits::default()).await.unwrap_err();
    assert_eq!(behind.code, ErrorCode::InvalidValue);
    for bad in [json!({"start_secs": 2.0, "end_secs": 1.0}), json!({"fps": 0.0}), json!({"start_secs": -1.0})] {
        assert_eq!(
            caption(bytes.clone(), bad, PrepareLimits::default()).await.unwrap_err().code,
            ErrorCode::InvalidValue
        );
    }
}

#[tokio::test]
async fn a_turned_video_is_shown_upright() {
    let folder = TempDir::new().unwrap();
    clip(folder.path(), "a.mp4", "-pix_fmt yuv420p");
    let (from, to) = (folder.path().join("a.mp4"), folder.path().join("turned.mp4"));
    ffmpeg(&format!("-i {} -c copy -metadata:s:v rotate=90 {}", from.display(), to.display()));
    let got = caption(std::fs::read(to).unwrap(), json!({}), PrepareLimits::default()).await.unwrap();
    assert!(got.media[0].grid_h > got.media[0].grid_w);
}

#[tokio::test]
async fn what_is_no_video_is_refused_with_its_code() {
    let folder = TempDir::new().unwrap();
    let sound = folder.path().join("sound.m4a");
    ffmpeg(&format!("-f lavfi -i sine=duration=0.2 -c:a aac {}", sound.display()));
    let whole = clip(folder.path(), "a.mp4", "-pix_fmt yuv420p -movflags +faststart");
    let mut noise = whole.clone();
    let half = noise.len() / 2;
    noise[half..].iter_mut().enumerate().for_each(|(i, byte)| *byte ^= (i * 89 + 7) as u8);
    let one = clip(folder.path(), "one.mp4", "-frames:v 1 -pix_fmt yuv420p");
    for (name, bytes, code) in [
        ("sound", std::fs::read(&sound).unwrap(), ErrorCode::MediaType),
        ("text", b"#EXTM3U\nfile:///etc/passwd\n".to_vec(), ErrorCode::MediaType),
        ("png", vec![0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A, 0, 0, 0, 0], ErrorCode::MediaType),
        ("empty", Vec::new(), ErrorCode::MediaDecode),
        ("head only", whole[..16].to_vec(), ErrorCode::MediaDecode),
        ("noise", noise, ErrorCode::MediaDecode),
        ("one frame", one, ErrorCode::InvalidValue),
    ] {
        let error = caption(bytes, json!({}), PrepareLimits::default()).await.expect_err(name);
        assert_eq!(error.code, code, "{name}: {error}");
    }
    let error = caption(whole, json!({"media_type": "image/png"}), PrepareLimits::default()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::MediaType);
}

#[tokio::test]
async fn no_prefix_of_a_video_is_taken_for_the_whole() {
    let folder = TempDir::new().unwrap();
    for options in ["-pix_fmt yuv420p", "-pix_fmt yuv420p -movflags +faststart"] {
        let whole = clip(folder.path(), "a.mp4", options);
        for step in 0..12 {
            let length = whole.len() * step / 12;
            let error =
                caption(whole[..length].to_vec(), json!({}), PrepareLimits::default()).await.expect_err("a prefix");
            assert!(matches!(error.code, ErrorCode::MediaDecode | ErrorCode::MediaType), "{options} {length}: {error}");
        }
    }
}

#[tokio::test]
async fn limits_hold() {
    let folder = TempDir::new().unwrap();
    let bytes = clip(folder.path(), "a.mp4", "-pix_fmt yuv420p");
    let default = PrepareLimits::default;
    for limits in [
        PrepareLimits { video_bytes: 100, ..default() },
        PrepareLimits { image_pixels: 1000, ..default() },
        PrepareLimits { video_frames: 24, ..default() },
        PrepareLimits { patch_bytes: 1000, ..default() },
        PrepareLimits { video_time: Duration::ZERO, ..default() },
    ] {
        let error = caption(bytes.clone(), json!({}), limits.clone()).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::TooLarge, "{limits:?}: {error}");
    }
    let missing = PrepareLimits { ffprobe: "/nonexistent/ffprobe".into(), ..default() };
    assert_eq!(caption(bytes, json!({}), missing).await.unwrap_err().code, ErrorCode::Internal);
}

#[tokio::test]
async fn nothing_stays_in_the_temporary_folder() {
    let (folder, temp) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let bytes = clip(folder.path(), "a.mp4", "-pix_fmt yuv420p");
    let limits = PrepareLimits { temp_folder: temp.path().into(), ..PrepareLimits::default() };
    caption(bytes.clone(), json!({}), limits.clone()).await.unwrap();
    caption(bytes[..100].to_vec(), json!({}), limits).await.unwrap_err();
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
}
