//! Reads a family's fixture and runs its cases.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use millrace_executor::checkpoint::Checkpoint;
use millrace_executor::engine::Engine;
use millrace_executor::generate::{GenerateOptions, Generated, Request, generate};
use millrace_executor::models::{self, Model};
use millrace_executor::{Dtype, KvBudget, LoadOptions, MediaSource, StepEngine};
use millrace_kernels::{Backend, CpuBackend};
use millrace_protocol::ready::MediaItem;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ActorId, ErrorCode, JobError, ModelName, PageDtype, PageRef};
use safetensors::SafeTensors;
use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct Item {
    start: u32,
    tokens: u32,
    grid_h: u32,
    grid_w: u32,
}

#[derive(Debug, Deserialize)]
pub struct Case {
    pub name: String,
    pub ids: Vec<u32>,
    items: Vec<Item>,
    pub answer: Vec<u32>,
    pub spread: f32,
    pub bf16_max_error: f32,
    pub bf16_high_error: f32,
    pub bf16_rms_error: f32,
    #[serde(default)]
    pub positions: Vec<[u32; 3]>,
    #[serde(default)]
    pub rope_delta: i64,
    /// Filled from the tensors: a row for each token of prompt and answer.
    #[serde(skip)]
    pub logits: Vec<Vec<f32>>,
    #[serde(skip)]
    pub media: Vec<MediaItem>,
}

#[derive(Deserialize)]
struct Cases {
    cases: Vec<Case>,
}

/// Where the fixtures are: beside this source, or below the working directory of a test executable that was carried to
/// another machine.
fn fixtures() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/fixtures");
    if beside.is_dir() { beside } else { PathBuf::from("tests/golden/fixtures") }
}

/// A fixture folder; also the pager of its cases.
pub struct Family {
    pub dir: PathBuf,
    pub cases: Vec<Case>,
    pub pages: HashMap<u64, Bytes>,
    /// Pages read.
    pub reads: usize,
}

impl Family {
    pub fn open(name: &str) -> Self {
        let dir = fixtures().join(name);
        let text = std::fs::read(dir.join("cases.json")).unwrap();
        let mut cases = serde_json::from_slice::<Cases>(&text).unwrap().cases;
        let file = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let mut pages = HashMap::new();
        for case in &mut cases {
            let logits = tensors.tensor(&format!("{}.logits", case.name)).unwrap();
            let values = floats(logits.data());
            case.logits = values.chunks(logits.shape()[1]).map(<[f32]>::to_vec).collect();
            for (n, item) in case.items.iter().enumerate() {
                let tensor = tensors.tensor(&format!("{}.pixels.{n}", case.name)).unwrap();
                let page = pages.len() as u64 + 1;
                let hash = u128::from(page).to_le_bytes();
                pages.insert(page, Bytes::copy_from_slice(tensor.data()));
                let patches = PageRef {
                    node: ActorId::new("fixture").unwrap(),
                    page,
                    dtype: PageDtype::F32,
                    shape: tensor.shape().iter().map(|n| *n as u32).collect(),
                    bytes: tensor.data().len() as u64,
                    hash,
                };
                let Item { start, tokens, grid_h, grid_w } = *item;
                case.media.push(MediaItem { start, tokens, grid_h, grid_w, patches, normalise: None });
            }
        }
        Self { dir, cases, pages, reads: 0 }
    }

    pub fn case(&self, name: &str) -> &Case {
        self.cases.iter().find(|case| case.name == name).unwrap()
    }

    /// An engine over this checkpoint in `dtype` that keeps all logits.
    pub fn engine(&self, dtype: Dtype) -> Engine<CpuBackend> {
        self.engine_with(dtype, |_| {})
    }

    /// The same with other options.
    pub fn engine_with(&self, dtype: Dtype, change: impl FnOnce(&mut LoadOptions)) -> Engine<CpuBackend> {
        let candle = if dtype == Dtype::F32 { candle_core::DType::F32 } else { candle_core::DType::BF16 };
        let mut options = options(dtype);
        change(&mut options);
        millrace_executor::engine::load_on(&self.dir, CpuBackend::new(candle).unwrap(), &options).unwrap()
    }

    /// The same with a backend and a change of the model of one's own.
    pub fn engine_on<B: Backend + 'static>(
        &self,
        backend: B,
        dtype: Dtype,
        change: impl FnOnce(Box<dyn Model<B>>) -> Box<dyn Model<B>>,
    ) -> Engine<B> {
        let model = models::load(Checkpoint::open(&self.dir).unwrap(), &backend).unwrap();
        Engine::new(backend, change(model), "fixture".into(), &options(dtype)).unwrap()
    }

    /// Generates `requests` together.
    pub fn run(
        &mut self,
        engine: &mut dyn StepEngine,
        requests: &[Request],
        options: &GenerateOptions,
    ) -> Vec<Generated> {
        let results = generate(engine, requests, options, self, &mut |_, _| {}).unwrap();
        results
            .into_iter()
            .map(|result| if let Some(error) = result.error { panic!("{error}") } else { result })
            .collect()
    }
}

/// Odd sizes: blocks of 5 tokens.
pub fn options(dtype: Dtype) -> LoadOptions {
    let (model, executor) = (ModelName::new("tiny").unwrap(), ActorId::new("test").unwrap());
    LoadOptions {
        dtype,
        kv: KvBudget::Blocks(200),
        block_tokens: 5,
        slots: 8,
        keep_logits: true,
        ..LoadOptions::in_process(model, executor)
    }
}

impl MediaSource for Family {
    fn patches(&mut self, page: &PageRef) -> Result<Bytes, JobError> {
        self.reads += 1;
        self.pages.get(&page.page).cloned().ok_or_else(|| JobError::new(ErrorCode::MediaMissing, "no such page"))
    }
}

impl Case {
    /// Answer from nothing, greedily.
    pub fn greedy(&self) -> Request {
        Request {
            prompt: self.ids.clone(),
            answer: Vec::new(),
            media: self.media.clone(),
            sampling: ResolvedSampling::greedy(),
            max_tokens: self.answer.len(),
            stop_token_ids: Vec::new(),
        }
    }

    /// The reference's answer given, so that a token that flips does not change what follows.
    pub fn forced(&self) -> Request {
        Request { answer: self.answer[..self.answer.len() - 1].to_vec(), ..self.greedy() }
    }

    /// Differences between `result`'s logits and the golden ones.
    pub fn compare(&self, result: &Generated) -> Differences {
        let mut all = Vec::new();
        for (n, row) in result.logits.iter().enumerate() {
            assert_eq!((row.index, row.logits.len()), (n, self.logits[n].len()));
            all.extend(row.logits.iter().zip(&self.logits[n]).map(|(got, golden)| (got - golden).abs()));
        }
        // Largest first; a NaN comes before every number, so that it never passes for a small difference.
        all.sort_by(|a, b| b.total_cmp(a));
        let squares: f64 = all.iter().map(|x| f64::from(x * x)).sum();
        let rms = (squares / all.len() as f64).sqrt() as f32;
        Differences { rows: result.logits.len(), max: all[0], high: all[all.len() / 1000], rms }
    }
}

#[derive(Debug)]
pub struct Differences {
    pub rows: usize,
    pub max: f32,
    /// Exceeded by one logit in a thousand.
    pub high: f32,
    pub rms: f32,
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}
