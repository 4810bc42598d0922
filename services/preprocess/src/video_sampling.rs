//! Which frames of a video the model sees, and the times that stand in the prompt (transformers 5.17,
//! `Qwen3VLVideoProcessor.sample_frames` and `Qwen3VLProcessor._calculate_timestamps`).

use crate::processor_config::VideoSettings;

/// Frame rate assumed where a video does not say.
pub const DEFAULT_FPS: f64 = 24.0;

/// Indices of the frames sampled out of `total` at `source_fps`: evenly from first to last, `fps` (absent: the
/// checkpoint's) per second, within the checkpoint's bounds. Strictly increasing.
pub fn sample_indices(total: u32, source_fps: f64, fps: Option<f64>, settings: &VideoSettings) -> Vec<u32> {
    let wanted = (f64::from(total) / source_fps * fps.unwrap_or(settings.fps)).clamp(0.0, f64::from(u32::MAX)) as u32;
    let count = wanted.max(settings.min_frames).min(settings.max_frames).min(total);
    let last = f64::from(total.saturating_sub(1));
    match count {
        0 => Vec::new(),
        1 => vec![0],
        _ => {
            let step = last / f64::from(count - 1);
            // The last one is the end itself: a product of rounded steps could miss it.
            let index = |i: u32| if i == count - 1 { last } else { f64::from(i) * step };
            (0..count).map(|i| index(i).round_ties_even() as u32).collect()
        }
    }
}

/// Text of each temporal group's time: the mean of its first and last frame's, `indices` counted at `fps`. The last
/// frame fills up the last group.
pub fn timestamp_texts(indices: &[u32], fps: f64, group: usize) -> Vec<String> {
    let time = |index: &u32| f64::from(*index) / fps;
    let middle = |frames: &[u32]| {
        let (first, last) = (frames.first().map_or(0.0, time), frames.last().map_or(0.0, time));
        format!("<{:.1} seconds>", (first + last) / 2.0)
    };
    indices.chunks(group.max(1)).map(middle).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden_tests::golden;
    use crate::processor_config::ProcessorConfig;
    use serde_json::json;

    #[test]
    fn indices_are_those_of_the_reference() {
        let settings = ProcessorConfig::from_values(json!({}), json!({})).video;
        for case in golden("processors.json")["samples"].as_array().unwrap() {
            let indices = sample_indices(case[0].as_u64().unwrap() as u32, case[1].as_f64().unwrap(), None, &settings);
            assert_eq!(json!(indices[..indices.len().min(100)]), case[2], "{} frames at {}", case[0], case[1]);
        }
        assert_eq!(sample_indices(0, 30.0, None, &settings), Vec::<u32>::new());
        assert_eq!(sample_indices(100, 10.0, Some(0.5), &settings).len(), 5);
    }

    #[test]
    fn times_round_as_in_python() {
        for case in golden("processors.json")["times"].as_array().unwrap() {
            let time = case[0].as_f64().unwrap();
            assert_eq!(format!("<{time:.1} seconds>"), case[1].as_str().unwrap());
        }
        assert_eq!(timestamp_texts(&[0, 1, 2], 2.0, 2), ["<0.2 seconds>", "<1.0 seconds>"]);
    }
}
