//! Against the reference: transformers 5.17 and torchvision 0.29, through the files that `tests/golden/make.py` wrote.

use std::path::{Path, PathBuf};

use millrace_protocol::PageDtype;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use crate::chat_template::{ChatTemplate, TemplateInput};
use crate::patchify::{PatchLayout, Patchifier};
use crate::processor_config::{Pixels, ProcessorConfig};
use crate::smart_resize::{SizeBounds, image_size, video_size};

pub(crate) fn golden(name: &str) -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The formula of `noise` in make.py.
pub(crate) fn noise(seed: u32, length: usize) -> Vec<u8> {
    (0..length as u32).map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) ^ (i >> 3)) >> 24) as u8).collect()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn number(value: &Json, key: &str) -> u32 {
    value[key].as_u64().unwrap() as u32
}

/// Pixels back out of single-slot f32 patches that were written with mean 0 and deviation 1/255.
fn pixels_of(patches: &[u8], height: usize, width: usize, layout: PatchLayout) -> Vec<u8> {
    let PatchLayout { patch, merge, .. } = layout;
    let mut out = vec![0; height * width * 3];
    let across = width / patch / merge;
    for (index, value) in patches.chunks_exact(4).enumerate() {
        let (patch_index, inside) = (index / (3 * patch * patch), index % (3 * patch * patch));
        let (channel, y, x) = (inside / (patch * patch), inside / patch % patch, inside % patch);
        let (block, within) = (patch_index / (merge * merge), patch_index % (merge * merge));
        let row = (block / across * merge + within / merge) * patch + y;
        let column = (block % across * merge + within % merge) * patch + x;
        out[(row * width + column) * 3 + channel] = f32::from_le_bytes(value.try_into().unwrap()).round() as u8;
    }
    out
}

#[test]
fn resizing_is_bit_exact() {
    for case in golden("resize.json").as_array().unwrap() {
        let (h, w, oh, ow) = (number(case, "h"), number(case, "w"), number(case, "oh"), number(case, "ow"));
        let layout = PatchLayout { patch: 16, merge: 2, slots: 1 };
        let patchifier = Patchifier::new((h, w), (oh, ow), layout, [0.0; 3], [1.0 / 255.0; 3], PageDtype::F32);
        let mut out = vec![0; patchifier.output_bytes()];
        assert!(patchifier.write(&noise(number(case, "seed"), (h * w * 3) as usize), 0, &mut out));
        let pixels = pixels_of(&out, oh as usize, ow as usize, layout);
        if let Some(hex) = case["out_hex"].as_str() {
            let expected: Vec<u8> =
                (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
            let wrong = pixels.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert_eq!(wrong, 0, "{h}x{w} -> {oh}x{ow}: {wrong} samples differ");
        }
        assert_eq!(sha256(&pixels), case["sha256"].as_str().unwrap(), "{h}x{w} -> {oh}x{ow}");
    }
}

/// Repeats the one slot of stills, as the reference stores them.
pub(crate) fn repeat_slots(patches: &[u8], plane_bytes: usize, slots: usize) -> Vec<u8> {
    patches.chunks_exact(plane_bytes).flat_map(|plane| plane.repeat(slots)).collect()
}

fn patches(
    pixels: &Pixels,
    frames: &[&[u8]],
    from: (u32, u32),
    to: (u32, u32),
    slots: usize,
    dtype: PageDtype,
) -> (Vec<u8>, (u32, u32)) {
    let layout = PatchLayout { patch: pixels.patch as usize, merge: pixels.merge as usize, slots };
    let patchifier = Patchifier::new(from, to, layout, pixels.mean, pixels.std, dtype);
    let mut all = Vec::new();
    for group in frames.chunks(slots) {
        let mut out = vec![0; patchifier.output_bytes()];
        for slot in 0..slots {
            assert!(patchifier.write(group[slot.min(group.len() - 1)], slot, &mut out));
        }
        all.extend(out);
    }
    (all, patchifier.grid())
}

#[test]
fn image_pixel_values_are_those_of_the_reference() {
    for case in golden("processors.json")["images"].as_array().unwrap() {
        let (h, w) = (number(case, "h"), number(case, "w"));
        let config = ProcessorConfig::from_values(case["config"].clone(), Json::Object(Default::default())).image;
        let to = image_size(h, w, config.bounds).unwrap();
        let frame = noise(number(case, "seed"), (h * w * 3) as usize);
        for (dtype, key) in [(PageDtype::F32, "sha256"), (PageDtype::Bf16, "bf16_sha256")] {
            let (out, grid) = patches(&config, &[&frame], (h, w), to, 1, dtype);
            assert_eq!(serde_json::json!([1, grid.0, grid.1]), case["grid"], "{h}x{w}");
            let plane = (config.patch * config.patch) as usize * dtype.size_bytes();
            assert_eq!(sha256(&repeat_slots(&out, plane, 2)), case[key].as_str().unwrap(), "{h}x{w} {key}");
        }
    }
}

#[test]
fn video_pixel_values_are_those_of_the_reference() {
    for case in golden("processors.json")["videos"].as_array().unwrap() {
        let (h, w, total) = (number(case, "h"), number(case, "w"), number(case, "total"));
        let config = ProcessorConfig::from_values(Json::Object(Default::default()), case["config"].clone()).video;
        let frames = noise(number(case, "seed"), (total * h * w * 3) as usize);
        let frames: Vec<&[u8]> = frames.chunks_exact((h * w * 3) as usize).collect();
        let indices = case["indices"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as usize);
        let chosen: Vec<&[u8]> = indices.map(|i| frames[i]).collect();
        let count = chosen.len() as u32;
        let to = video_size(count, h, w, config.pixels.temporal, config.bounds(count)).unwrap();
        let (out, grid) = patches(&config.pixels, &chosen, (h, w), to, 2, PageDtype::F32);
        assert_eq!(serde_json::json!([count.div_ceil(2), grid.0, grid.1]), case["grid"], "{case}");
        assert_eq!(sha256(&out), case["sha256"].as_str().unwrap(), "{case}");
    }
}

/// Bytes, normalised as the device does it, are the normalised patches: stills and clips, resized or not, in runs on one core and
/// on several.
#[test]
fn bytes_become_the_normalised_patches() {
    let mut pixels =
        ProcessorConfig::from_values(Json::Object(Default::default()), Json::Object(Default::default())).image;
    (pixels.mean, pixels.std) = ([0.481_454_66, 0.457_827_5, 0.3], [0.268_629_54, 0.261_302_6, 0.7]);
    for (patch, slots, from, to) in [
        (16, 1, (37, 91), (64, 96)),
        (16, 2, (100, 51), (96, 64)),
        (14, 1, (28, 56), (28, 56)),
        (14, 3, (61, 33), (84, 56)),
        (16, 1, (701, 1203), (608, 1056)),
    ] {
        pixels.patch = patch;
        let frames: Vec<Vec<u8>> = (0..slots).map(|seed| noise(seed as u32, (from.0 * from.1 * 3) as usize)).collect();
        let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
        let make = |dtype| patches(&pixels, &frames, from, to, slots, dtype).0;
        let samples = make(PageDtype::U8);
        let plane = slots * (patch * patch) as usize;
        let value = |(n, x): (usize, &u8)| {
            let channel = n / plane % 3;
            (f32::from(*x) - pixels.mean[channel] * 255.0) / (pixels.std[channel] * 255.0)
        };
        let values: Vec<f32> = samples.iter().enumerate().map(value).collect();
        let wide: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let short: Vec<u8> = values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        assert!(wide == make(PageDtype::F32) && short == make(PageDtype::Bf16), "{patch} {slots} {from:?} {to:?}");
    }
}

#[test]
fn sizes_are_those_of_the_reference() {
    let golden = golden("processors.json");
    let row =
        |case: &Json| -> Vec<u32> { case.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect() };
    let bounds = SizeBounds { factor: 32, min_pixels: 65_536, max_pixels: 16_777_216 };
    for case in golden["sizes"].as_array().unwrap().iter().map(row) {
        assert_eq!(image_size(case[0], case[1], bounds), Ok((case[2], case[3])), "{case:?}");
    }
    let bounds = SizeBounds { factor: 32, min_pixels: 4_096, max_pixels: 25_165_824 };
    for case in golden["video_sizes"].as_array().unwrap().iter().map(row) {
        assert_eq!(video_size(case[0], case[1], case[2], 2, bounds), Ok((case[3], case[4])), "{case:?}");
    }
}

/// The demo checkpoint's template and tokenizer, kept beside the goldens.
fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/demo")
}

#[test]
fn conversations_render_and_tokenise_as_in_the_reference() {
    let golden = golden("prompts.json");
    let template = ChatTemplate::load(&demo()).unwrap().unwrap();
    let tokenizer = crate::Tokenizer::load(&demo()).unwrap();
    for case in golden["conversations"].as_array().unwrap() {
        let args = case["args"].as_object().unwrap();
        let tools = Some(&case["tools"]).filter(|tools| !tools.is_null());
        let input = TemplateInput { messages: case["messages"].as_array().unwrap(), tools, args, now_unix_ms: 0 };
        let text = template.render(input).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        assert_eq!(serde_json::json!(tokenizer.encode(&text).unwrap()), case["ids"], "{text}");
    }
    for case in golden["plain"].as_array().unwrap() {
        let ids = tokenizer.encode_plain(case[0].as_str().unwrap()).unwrap();
        assert_eq!(serde_json::json!(ids), case[1], "{case}");
    }
}

#[test]
fn templates_see_python() {
    let golden = golden("prompts.json");
    let mut wrong = Vec::new();
    for case in golden["snippets"].as_array().unwrap() {
        let source = case[0].as_str().unwrap();
        let input =
            TemplateInput { messages: &[], tools: None, args: golden["context"].as_object().unwrap(), now_unix_ms: 0 };
        let got = ChatTemplate::compile(source).map(|template| template.render(input));
        match got {
            Ok(Ok(text)) if text == case[1].as_str().unwrap() => {}
            other => wrong.push(format!("{source}\n  got  {other:?}\n  want {:?}", case[1])),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
