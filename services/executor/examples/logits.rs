//! Logits of given token sequences, for comparisons with other programs (tests/bench/cuda/compare.py):
//!
//!     logits MODEL_DIR CASES_DIR OUT.safetensors cpu-f32|cpu-bf16|cuda plain|graphs single|together
//!
//! CASES_DIR holds cases.json: `{"cases": [{"name", "ids", "answer", "keep", "items": [{"start", "tokens", "grid_h", "grid_w"}]}]}`
//! and pixels.safetensors: bf16 `NAME.pixels.N` for each item, `[rows, channels, slots, patch, patch]`. The prompt is computed as a
//! whole, the answer one token at a time. Written are `NAME.logits`, f32: the last `keep` rows of prompt and answer.
//! `single` runs one sequence after another, `together` all side by side.

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;

use bytes::Bytes;
use millrace_executor::generate::{GenerateOptions, Request, generate};
use millrace_executor::{DeviceKind, Dtype, KvBudget, LoadOptions, MediaSource, StepEngine, load};
use millrace_protocol::ready::MediaItem;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ActorId, ErrorCode, JobError, ModelName, PageDtype, PageRef};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::Deserialize;

const BLOCK_TOKENS: u32 = 16;

#[derive(Deserialize)]
struct Item {
    start: u32,
    tokens: u32,
    grid_h: u32,
    grid_w: u32,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    ids: Vec<u32>,
    answer: Vec<u32>,
    keep: usize,
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Cases {
    cases: Vec<Case>,
}

/// Pages in memory, by number.
struct Pages(Vec<Bytes>);

impl MediaSource for Pages {
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError> {
        let found = usize::try_from(page.page).ok().and_then(|page| self.0.get(page)).cloned();
        found.ok_or_else(|| JobError::new(ErrorCode::MediaMissing, "no such page"))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, cases, out, device, steps, how] = arguments.as_slice() else {
        return Err("usage: logits MODEL_DIR CASES_DIR OUT cpu-f32|cpu-bf16|cuda plain|graphs single|together".into());
    };
    let cases_dir = Path::new(cases);
    let Cases { cases } = serde_json::from_slice(&std::fs::read(cases_dir.join("cases.json"))?)?;
    let pixels = std::fs::read(cases_dir.join("pixels.safetensors"))?;
    let (requests, mut pages) = requests(&cases, &SafeTensors::deserialize(&pixels)?)?;
    let mut engine = engine(Path::new(model), &cases, device, steps == "graphs")?;
    let options = GenerateOptions { decode_answers: true, ..GenerateOptions::default() };
    let group = if how == "together" { requests.len() } else { 1 };
    let mut kept = Vec::new();
    for (requests, cases) in requests.chunks(group.max(1)).zip(cases.chunks(group.max(1))) {
        let results = generate(engine.as_mut(), requests, &options, &mut pages, &mut |_, _| {})?;
        for (case, result) in cases.iter().zip(results) {
            if let Some(error) = result.error {
                return Err(format!("{}: {error}", case.name).into());
            }
            let rows = result.logits.len().checked_sub(case.keep).map(|from| &result.logits[from..]);
            let rows = rows.ok_or_else(|| format!("{}: {} rows of logits", case.name, result.logits.len()))?;
            let bytes: Vec<u8> = rows.iter().flat_map(|row| row.logits.iter().flat_map(|x| x.to_le_bytes())).collect();
            kept.push((format!("{}.logits", case.name), vec![rows.len(), rows[0].logits.len()], bytes));
        }
    }
    let views = kept
        .iter()
        .map(|(name, shape, bytes)| {
            TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).map(|view| (name, view))
        })
        .collect::<Result<HashMap<_, _>, _>>()?;
    Ok(safetensors::serialize_to_file(views, None, Path::new(out))?)
}

/// The sequences with their media, and the media's pages.
fn requests(cases: &[Case], pixels: &SafeTensors<'_>) -> Result<(Vec<Request>, Pages), Box<dyn Error>> {
    let (mut requests, mut pages) = (Vec::new(), Vec::new());
    for case in cases {
        let mut media = Vec::new();
        for (n, item) in case.items.iter().enumerate() {
            let tensor = pixels.tensor(&format!("{}.pixels.{n}", case.name))?;
            let patches = PageRef {
                node: ActorId::new("example")?,
                page: pages.len() as u64,
                dtype: PageDtype::Bf16,
                shape: tensor.shape().iter().map(|size| u32::try_from(*size)).collect::<Result<_, _>>()?,
                bytes: tensor.data().len() as u64,
                // Not checked here; it keeps one page from being taken for another.
                hash: (pages.len() as u128).to_le_bytes(),
            };
            pages.push(Bytes::copy_from_slice(tensor.data()));
            let Item { start, tokens, grid_h, grid_w } = *item;
            media.push(MediaItem { start, tokens, grid_h, grid_w, patches, normalise: None });
        }
        requests.push(Request {
            prompt: case.ids.clone(),
            answer: case.answer.clone(),
            media,
            sampling: ResolvedSampling::greedy(),
            max_tokens: case.answer.len() + 1,
            stop_token_ids: Vec::new(),
        });
    }
    Ok((requests, Pages(pages)))
}

fn engine(model: &Path, cases: &[Case], device: &str, graphs: bool) -> Result<Box<dyn StepEngine>, Box<dyn Error>> {
    let blocks = |case: &Case| (case.ids.len() + case.answer.len() + 1).div_ceil(BLOCK_TOKENS as usize);
    let (name, executor) = (ModelName::new("model")?, ActorId::new("example")?);
    let options = LoadOptions {
        device: if device == "cuda" { DeviceKind::Cuda(0) } else { DeviceKind::Cpu },
        dtype: if device == "cpu-f32" { Dtype::F32 } else { Dtype::Bf16 },
        kv: KvBudget::Blocks(u32::try_from(cases.iter().map(blocks).sum::<usize>())? + 1),
        block_tokens: BLOCK_TOKENS,
        slots: u32::try_from(cases.len())?,
        keep_logits: true,
        ..LoadOptions::in_process(name, executor)
    };
    if device == "cuda" && !graphs {
        return plain_cuda(model, &options);
    }
    Ok(load(model, &options)?)
}

/// An engine that records no steps: not what anybody serves with, so no option of [`load`].
#[cfg(feature = "cuda")]
fn plain_cuda(model: &Path, options: &LoadOptions) -> Result<Box<dyn StepEngine>, Box<dyn Error>> {
    let backend = millrace_kernels::CudaBackend::new(0, false)?;
    Ok(Box::new(millrace_executor::engine::load_on(model, backend, options)?))
}

#[cfg(not(feature = "cuda"))]
fn plain_cuda(_model: &Path, _options: &LoadOptions) -> Result<Box<dyn StepEngine>, Box<dyn Error>> {
    Err("this build has no CUDA backend".into())
}
