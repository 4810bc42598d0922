//! Whole jobs through both stages, on the demo checkpoint's files: against the reference's processor, and refused.

use std::path::Path;

use bytes::Bytes;
use millrace_protocol::ready::Normalise;
use millrace_protocol::{ErrorCode, JobError, JobId, JobRequest, PageDtype};
use serde_json::{Value as Json, json};

use crate::golden_tests::{golden, noise, repeat_slots, sha256};
use crate::limits::PrepareLimits;
use crate::prepare::{MediaFetch, Prepared, Preparer};

/// A bucket with a few objects.
#[derive(Default)]
pub(crate) struct Bucket(pub(crate) Vec<(&'static str, Vec<u8>)>);

impl MediaFetch for Bucket {
    async fn object(&self, name: &str, _: u64) -> Result<Bytes, JobError> {
        let found = self.0.iter().find(|(key, _)| *key == name).map(|(_, bytes)| Bytes::from(bytes.clone()));
        found.ok_or_else(|| JobError::new(ErrorCode::MediaMissing, format!("no object is called {name}")))
    }
}

pub(crate) fn preparer(limits: PrepareLimits) -> Preparer {
    Preparer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo"), limits).unwrap()
}

pub(crate) async fn prepare_with(preparer: &Preparer, bucket: &Bucket, job: Json) -> Result<Prepared, JobError> {
    let request: JobRequest = serde_json::from_value(job).unwrap();
    let gathered = preparer.gather(&request, bucket).await?;
    preparer.build(&request, &JobId::new("job-1").unwrap(), gathered, 0)
}

pub(crate) async fn prepare(job: Json) -> Result<Prepared, JobError> {
    prepare_with(&preparer(PrepareLimits::default()), &Bucket::default(), job).await
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

pub(crate) fn raw(pixels: &[u8], height: usize, width: usize) -> Json {
    json!({"data": base64(pixels), "raw": {"width": width, "height": height}})
}

fn user(content: Json) -> Json {
    json!({"messages": [{"role": "user", "content": content}]})
}

fn size(value: &Json) -> usize {
    value.as_u64().unwrap() as usize
}

/// The golden's content with its media put in.
fn with_media(case: &Json) -> Json {
    let mut images = case["images"].as_array().unwrap().iter();
    let mut videos = case["videos"].as_array().unwrap().iter();
    let parts = case["content"].as_array().unwrap().iter().map(|part| match part["type"].as_str().unwrap() {
        "image" => {
            let image = images.next().unwrap();
            let (seed, h, w) = (size(&image[0]), size(&image[1]), size(&image[2]));
            let mut part = raw(&noise(seed as u32, h * w * 3), h, w);
            part["type"] = json!("image");
            part
        }
        "video" => {
            let video = videos.next().unwrap();
            let (seed, n, h, w) = (size(&video[0]), size(&video[1]), size(&video[3]), size(&video[4]));
            let pixels = noise(seed as u32, n * h * w * 3);
            let frames: Vec<Json> = pixels.chunks_exact(h * w * 3).map(|frame| raw(frame, h, w)).collect();
            json!({"type": "frames", "fps": video[2], "frames": frames})
        }
        _ => part.clone(),
    });
    parts.collect()
}

#[tokio::test]
async fn jobs_become_what_the_reference_processor_makes() {
    for case in golden("prepare.json").as_array().unwrap() {
        let got = prepare(user(with_media(case))).await.unwrap();
        assert_eq!(json!(got.prompt), case["ids"], "{}", case["content"]);
        let plane = 16 * 16 * 2;
        let (stills, groups): (Vec<_>, Vec<_>) = got.media.iter().partition(|item| item.shape[2] == 1);
        let grids: Vec<Json> = stills.iter().map(|item| json!([1, item.grid_h, item.grid_w])).collect();
        assert_eq!(json!(grids), case["image_grid"]);
        let pixels: Vec<u8> = stills.iter().flat_map(|item| repeat_slots(&item.patches, plane, 2)).collect();
        assert_eq!(case["image_sha256"].as_str().unwrap_or(&sha256(b"")), sha256(&pixels));
        let counts = case["video_grid"].as_array().unwrap().iter().map(|grid| size(&grid[0])).sum::<usize>();
        assert_eq!(groups.len(), counts);
        let pixels: Vec<u8> = groups.iter().flat_map(|item| item.patches.to_vec()).collect();
        assert_eq!(case["video_sha256"].as_str().unwrap_or(&sha256(b"")), sha256(&pixels));
        for item in &got.media {
            let (start, tokens) = (item.start as usize, item.tokens as usize);
            let placeholder = if item.shape[2] == 1 { 1010 } else { 1011 };
            assert_eq!(item.tokens, item.grid_h * item.grid_w / 4);
            assert!(got.prompt[start..start + tokens].iter().all(|&id| id == placeholder));
            assert!(got.prompt[start - 1] != placeholder && got.prompt[start + tokens] != placeholder);
            assert_eq!(item.patches.len(), item.shape.iter().product::<u32>() as usize * 2);
        }
    }
}

#[tokio::test]
async fn pages_of_bytes_say_how_they_are_normalised() {
    let with = |dtype| preparer(PrepareLimits { dtype: Some(dtype), ..PrepareLimits::default() });
    for case in golden("prepare.json").as_array().unwrap() {
        let job = user(with_media(case));
        let wide = prepare_with(&with(PageDtype::F32), &Bucket::default(), job.clone()).await.unwrap();
        let bytes = prepare_with(&with(PageDtype::U8), &Bucket::default(), job).await.unwrap();
        assert_eq!((&bytes.prompt, bytes.media.len()), (&wide.prompt, wide.media.len()));
        for (bytes, wide) in bytes.media.iter().zip(&wide.media) {
            assert_eq!((bytes.dtype, bytes.shape, bytes.start), (PageDtype::U8, wide.shape, wide.start));
            let (Normalise { mean, std }, None) = (bytes.normalise.unwrap(), wide.normalise) else { panic!() };
            let plane = bytes.shape[2..].iter().product::<u32>() as usize;
            let value = |(n, x): (usize, &u8)| {
                ((f32::from(*x) - mean[n / plane % 3] * 255.0) / (std[n / plane % 3] * 255.0)).to_le_bytes()
            };
            assert!(bytes.patches.iter().enumerate().flat_map(value).eq(wide.patches.iter().copied()));
        }
    }
}

/// The comparison above can fail: each way in which a port gets times wrong gives other tokens than the reference's.
#[tokio::test]
async fn wrong_times_are_seen() {
    let mut seen = 0;
    for case in golden("prepare.json").as_array().unwrap().iter().filter(|case| case["videos"] != json!([])) {
        let right = with_media(case);
        let first = right.as_array().unwrap().iter().position(|part| part["type"] == "frames").unwrap();
        let (fps, frames) = (right[first]["fps"].as_f64().unwrap(), right[first]["frames"].as_array().unwrap().len());
        let indices = |index: &dyn Fn(usize) -> usize| json!((0..frames).map(index).collect::<Vec<_>>());
        // A rate of another unit, counting from one, and the time of a group's first frame instead of the middle of its frames.
        let faults =
            [("fps", json!(fps * 2.0)), ("indices", indices(&|n| n + 1)), ("indices", indices(&|n| n / 2 * 2))];
        assert_eq!(json!(prepare(user(right.clone())).await.unwrap().prompt), case["ids"]);
        for (key, value) in faults {
            let mut wrong = right.clone();
            wrong[first][key] = value;
            let got = prepare(user(wrong)).await.unwrap();
            assert_ne!(json!(got.prompt), case["ids"], "{key} of {}", case["videos"]);
            seen += 1;
        }
    }
    assert!(seen >= 9);
}

#[tokio::test]
async fn plain_video_prompts_have_no_outer_pair() {
    let frames: Vec<Json> = (0..4).map(|seed| raw(&noise(seed, 64 * 64 * 3), 64, 64)).collect();
    let job = user(json!([{"type": "frames", "fps": 2.0, "frames": frames}]));
    let limits = PrepareLimits { nested_video: false, ..PrepareLimits::default() };
    let plain = prepare_with(&preparer(limits), &Bucket::default(), job.clone()).await.unwrap();
    let nested = prepare(job).await.unwrap();
    assert_eq!(plain.prompt.len() + 2, nested.prompt.len());
    assert_eq!(plain.prompt.iter().filter(|&&id| id == 1007).count(), 2);
    assert_eq!(nested.prompt.iter().filter(|&&id| id == 1007).count(), 3);
}

#[tokio::test]
async fn indices_set_the_times() {
    let frames: Vec<Json> = (0..2).map(|seed| raw(&noise(seed, 64 * 64 * 3), 64, 64)).collect();
    let job = |indices: Json| user(json!([{"type": "frames", "fps": 10.0, "frames": frames, "indices": indices}]));
    let at = |got: &Prepared| {
        preparer(PrepareLimits::default())
            .tokenizer()
            .encode("<15.0 seconds>")
            .map(|ids| got.prompt.windows(ids.len()).any(|window| window == ids))
    };
    assert!(at(&prepare(job(json!([100, 200]))).await.unwrap()).unwrap());
    assert!(!at(&prepare(job(Json::Null)).await.unwrap()).unwrap());
    assert_eq!(prepare(job(json!([100]))).await.unwrap_err().code, ErrorCode::InvalidValue);
    assert_eq!(prepare(job(json!([200, 100]))).await.unwrap_err().code, ErrorCode::InvalidValue);
}

#[tokio::test]
async fn prompts_without_a_template() {
    let got =
        prepare(json!({"prompt_token_ids": [1, 2, 3], "max_tokens": 7, "stop_token_ids": [5, 998]})).await.unwrap();
    assert_eq!((got.prompt, got.max_tokens, got.stop_token_ids), (vec![1, 2, 3], 7, vec![5, 998, 1000]));
    let got = prepare(json!({"prompt": "hello world", "ignore_eos": true})).await.unwrap();
    assert_eq!(json!(got.prompt), golden("prompts.json")["plain"][1][1]);
    assert!(got.stop_token_ids.is_empty());
    assert_eq!(got.max_tokens, 48, "the checkpoint's max_new_tokens");
    let almost_full = vec![1u32; 2040];
    assert_eq!(prepare(json!({"prompt_token_ids": almost_full})).await.unwrap().max_tokens, 8, "cut to what fits");
}

#[tokio::test]
async fn every_fault_of_a_document_has_its_code() {
    let image = json!({"type": "image", "data": base64(b"nothing")});
    let pixels = raw(&[0; 12], 2, 2);
    let frames = |list: Json| user(json!([{"type": "frames", "fps": 2.0, "frames": list}]));
    let mut long = vec![json!({"role": "user", "content": "x"})];
    long.extend((0..2000).map(|_| json!({"role": "user", "content": "word"})));
    let cases = [
        (json!({}), ErrorCode::NoPrompt),
        (json!({"prompt": "a", "prompt_token_ids": [1]}), ErrorCode::NoPrompt),
        (json!({"prompt": ""}), ErrorCode::NoPrompt),
        (json!({"messages": []}), ErrorCode::NoPrompt),
        (json!({"prompt_token_ids": []}), ErrorCode::NoPrompt),
        (json!({"prompt_token_ids": [1024]}), ErrorCode::TokenRange),
        (json!({"prompt": "a", "stop_token_ids": [5000]}), ErrorCode::TokenRange),
        (json!({"prompt_token_ids": [1010]}), ErrorCode::MediaMismatch),
        (json!({"prompt": "<|video_pad|>"}), ErrorCode::MediaMismatch),
        (user(json!("<|video_pad|>")), ErrorCode::MediaMismatch),
        (json!({"prompt": "a", "priority": 10}), ErrorCode::InvalidValue),
        (json!({"prompt": "a", "max_tokens": 0}), ErrorCode::InvalidValue),
        (json!({"prompt": "a", "max_tokens": 2048}), ErrorCode::ContextLength),
        (json!({"prompt_token_ids": vec![1u32; 2048]}), ErrorCode::ContextLength),
        (json!({"messages": long}), ErrorCode::ContextLength),
        (json!({"prompt": "a", "stop": [""]}), ErrorCode::InvalidValue),
        (json!({"prompt": "a", "stop": ["x".repeat(257)]}), ErrorCode::InvalidValue),
        (json!({"prompt": "a", "stop": vec!["x"; 17]}), ErrorCode::InvalidValue),
        (json!({"prompt": "a", "tools": "all"}), ErrorCode::InvalidValue),
        (json!({"prompt": "a", "sampling": {"top_p": 2.0}}), ErrorCode::InvalidValue),
        (user(json!([image])), ErrorCode::MediaType),
        (user(json!([{"type": "image"}])), ErrorCode::InvalidValue),
        (user(json!([{"type": "image", "object": "none"}])), ErrorCode::MediaMissing),
        (user(json!([{"type": "image", "data": "AAAA", "raw": {"width": 9, "height": 9}}])), ErrorCode::MediaDecode),
        (user(json!([{"type": "image", "data": "", "raw": {"width": 0, "height": 9}}])), ErrorCode::MediaDecode),
        (
            user(
                json!([{"type": "image", "data": "AAAA", "raw": {"width": 4_000_000_000u32, "height": 4_000_000_000u32}}]),
            ),
            ErrorCode::TooLarge,
        ),
        (frames(json!([])), ErrorCode::InvalidValue),
        (frames(json!([pixels])), ErrorCode::InvalidValue),
        (frames(json!([pixels, raw(&[0; 18], 2, 3)])), ErrorCode::InvalidValue),
        (user(json!([{"type": "frames", "fps": 0.0, "frames": []}])), ErrorCode::InvalidValue),
        (user(json!(vec![json!({"type": "image", "data": ""}); 65])), ErrorCode::TooLarge),
    ];
    for (job, code) in cases {
        let text: String = job.to_string().chars().take(120).collect();
        let error = prepare(job).await.expect_err(&text);
        assert_eq!(error.code, code, "{text}: {error}");
        assert!(error.message.len() > 20, "{error}");
    }
}

#[tokio::test]
async fn patches_beyond_the_budget_are_refused() {
    let limits = PrepareLimits { patch_bytes: 100_000, ..PrepareLimits::default() };
    let preparer = preparer(limits);
    let mut image = raw(&noise(1, 96 * 96 * 3), 96, 96);
    image["type"] = json!("image");
    assert!(prepare_with(&preparer, &Bucket::default(), user(json!([image]))).await.is_ok());
    let error = prepare_with(&preparer, &Bucket::default(), user(json!([image, image]))).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::TooLarge);
}

#[tokio::test]
async fn a_text_model_refuses_pictures_and_joins_text() {
    let folder = tempfile::TempDir::new().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo");
    std::fs::copy(demo.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let config =
        json!({"vocab_size": 1024, "max_position_embeddings": 128, "eos_token_id": [3, 4], "torch_dtype": "float32"});
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let bare = Preparer::load(folder.path(), PrepareLimits::default()).unwrap();
    let error = prepare_with(&bare, &Bucket::default(), user(json!("Hi"))).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Template);
    let template = "{% for m in messages %}{{ m.content if m.content is string else '' }}{% endfor %}";
    std::fs::write(folder.path().join("tokenizer_config.json"), json!({"chat_template": template}).to_string())
        .unwrap();
    let text = Preparer::load(folder.path(), PrepareLimits::default()).unwrap();
    let parts = json!([{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]);
    let got = prepare_with(&text, &Bucket::default(), user(parts)).await.unwrap();
    assert_eq!(json!(got.prompt), golden("prompts.json")["plain"][1][1]);
    assert_eq!(got.stop_token_ids, [3, 4]);
    let error =
        prepare_with(&text, &Bucket::default(), user(json!([{"type": "image", "data": "AAAA"}]))).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::MediaType);
}
