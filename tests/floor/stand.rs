//! A model on the test stand: official attention geometry (heads of 128; GLM's latents of 512 + 64), cut in width, layers and
//! vocabulary, random weights in the official layout; and plans by hand.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use millrace_executor::checkpoint::Checkpoint;
use millrace_executor::engine::Engine;
use millrace_executor::generate::{GenerateOptions, Generated, Request, generate};
use millrace_executor::random_weights::{RandomOptions, write_random};
use millrace_executor::{Dtype, KvBudget, LoadOptions, MediaSource, RowLogits, StepEngine, models};
use millrace_protocol::plan::{OpenSlot, SlotWork, StepPlan};
use millrace_protocol::ready::MediaItem;
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::{ActorId, BlockId, ErrorCode, JobError, JobId, ModelName, PageRef, SlotId};
use millrace_tests::workspace::root;
use serde_json::{Value, json};

use crate::recorder::{Call, Notebook, Recorder};

/// Blocks of a pool, and tokens of a block.
pub const BLOCKS: u32 = 24;
pub const BLOCK_TOKENS: u32 = 16;

/// A model's checkpoint in a temporary folder.
pub struct Stand {
    /// Name of the model file.
    pub name: &'static str,
    /// The cut config, of the language model where it is nested.
    pub text: Value,
    /// Whether the model takes images.
    pub sees: bool,
    folder: tempfile::TempDir,
    notebook: Notebook,
}

/// No media.
pub struct NoMedia;

impl MediaSource for NoMedia {
    fn patches(&mut self, _: &PageRef) -> Result<bytes::Bytes, JobError> {
        Err(JobError::new(ErrorCode::MediaMissing, "this sequence has no media"))
    }
}

impl Stand {
    /// Writes the checkpoint of `name`: the golden fixture's config with the attention geometry of the official one.
    pub fn new(name: &'static str) -> Result<Self> {
        let fixture = root().join("tests/golden/fixtures").join(name).join("config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(fixture)?)?;
        let nested = config.get("text_config").is_some();
        let text = if nested { &mut config["text_config"] } else { &mut config };
        match name {
            "glm4_moe_lite" => {
                for (key, value) in [
                    ("q_lora_rank", 96),
                    ("kv_lora_rank", 512),
                    ("qk_nope_head_dim", 192),
                    ("qk_rope_head_dim", 64),
                    ("v_head_dim", 256),
                ] {
                    text[key] = json!(value);
                }
            }
            _ => text["head_dim"] = json!(128),
        }
        if nested {
            text["rope_parameters"]["mrope_section"] = json!([24, 20, 20]);
        }
        let text = text.clone();
        let folder = tempfile::tempdir()?;
        let source = folder.path().join("config");
        std::fs::create_dir(&source)?;
        std::fs::write(source.join("config.json"), config.to_string())?;
        write_random(&source, folder.path(), &RandomOptions { layers: None, seed: 3 })?;
        Ok(Self { name, text, sees: nested, folder, notebook: Notebook::default() })
    }

    /// A size of the config.
    pub fn size(&self, key: &str) -> Result<usize> {
        let value = self.text[key].as_u64().with_context(|| format!("{key} of {}", self.name))?;
        Ok(usize::try_from(value)?)
    }

    /// Layers whose feed-forward is dense, and those with experts.
    pub fn dense_and_sparse(&self) -> Result<(usize, usize)> {
        let layers = self.size("num_hidden_layers")?;
        let dense = match self.name {
            "qwen3_moe" => self.text["mlp_only_layers"].as_array().map_or(0, Vec::len),
            "glm4_moe_lite" => {
                let kinds = self.text["mlp_layer_types"].as_array().context("mlp_layer_types")?;
                kinds.iter().filter(|kind| *kind == "dense").count()
            }
            _ => layers,
        };
        Ok((dense, layers - dense))
    }

    /// Numbers of one token in one layer's cache, from the config.
    pub fn cached(&self) -> Result<usize> {
        if self.name == "glm4_moe_lite" {
            return Ok(self.size("kv_lora_rank")? + self.size("qk_rope_head_dim")?);
        }
        Ok(2 * self.size("num_key_value_heads")? * self.size("head_dim")?)
    }

    /// The checkpoint.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// An engine that keeps all logits; its calls of the backend are forgotten but for the pools.
    pub fn engine(&self) -> Result<(Engine<Recorder>, Vec<Call>)> {
        let backend = Recorder::new(DType::F32, self.notebook.clone());
        let model = models::load(Checkpoint::open(self.folder())?, &backend)?;
        let options = LoadOptions {
            dtype: Dtype::F32,
            kv: KvBudget::Blocks(BLOCKS),
            block_tokens: BLOCK_TOKENS,
            slots: 4,
            keep_logits: true,
            ..LoadOptions::in_process(ModelName::new("floor")?, ActorId::new("floor")?)
        };
        self.notebook.take();
        let engine = Engine::new(backend, model, "floor".into(), &options)?;
        let pools = self.notebook.take().into_iter().filter(|call| matches!(call, Call::Pool { .. }));
        Ok((engine, pools.collect()))
    }

    /// Runs one step; returns what was drawn for each slot, the logits and the calls.
    pub fn step(&self, engine: &mut dyn StepEngine, plan: &StepPlan, media: &mut dyn MediaSource) -> Result<Step> {
        self.notebook.take();
        let output = engine.step(plan, media);
        ensure!(output.broken.is_none() && output.failed.is_empty(), "{output:?}");
        let drawn = output.tokens.iter().map(|token| (token.slot.0, token.token)).collect();
        Ok(Step { drawn, logits: engine.take_logits(), calls: self.notebook.take() })
    }

    /// Generates alone on a fresh engine; `order` is the order in which blocks are handed out.
    pub fn alone(
        &self,
        prompt: &[u32],
        items: &[MediaItem],
        tokens: usize,
        order: Option<Vec<u32>>,
        media: &mut dyn MediaSource,
    ) -> Result<(Generated, Vec<Call>)> {
        let (mut engine, _) = self.engine()?;
        let request = Request {
            prompt: prompt.to_vec(),
            answer: Vec::new(),
            media: items.to_vec(),
            sampling: ResolvedSampling::greedy(),
            max_tokens: tokens,
            stop_token_ids: Vec::new(),
        };
        let options = GenerateOptions { block_order: order, ..GenerateOptions::default() };
        let result = generate(&mut engine, &[request], &options, media, &mut |_, _| {})?.remove(0);
        ensure!(result.error.is_none(), "{:?}", result.error);
        Ok((result, self.notebook.take()))
    }
}

/// What one step did.
pub struct Step {
    /// Slot and token.
    pub drawn: Vec<(u32, u32)>,
    /// Logits of every row.
    pub logits: Vec<RowLogits>,
    /// Ops of the backend.
    pub calls: Vec<Call>,
}

impl Step {
    /// The token drawn for `slot`.
    pub fn token(&self, slot: u32) -> Result<u32> {
        self.drawn.iter().find(|(own, _)| *own == slot).map(|(_, token)| *token).context("nothing was drawn")
    }

    /// Whether the logits of `slot` are bit for bit those that it has alone.
    pub fn agrees(&self, slot: u32, alone: &Generated) -> bool {
        let mut own = self.logits.iter().filter(|row| row.slot == slot).peekable();
        own.peek().is_some()
            && own.all(|row| {
                let truth = &alone.logits[row.index].logits;
                row.logits.iter().zip(truth).all(|(a, b)| a.to_bits() == b.to_bits()) && row.logits.len() == truth.len()
            })
    }
}

/// `count` tokens that differ with `seed`.
pub fn tokens(count: u32, seed: u32) -> Vec<u32> {
    (0..count).map(|n| (n * 37 + seed * 101 + 5) % 320).collect()
}

/// Opens `slot` with a prompt.
pub fn open(slot: u32, prompt: &[u32], media: &[MediaItem]) -> Result<OpenSlot> {
    Ok(OpenSlot {
        slot: SlotId(slot),
        job: JobId::new(format!("job-{slot}"))?,
        tokens: prompt.to_vec(),
        prompt_tokens: u32::try_from(prompt.len())?,
        media: media.to_vec(),
        sampling: ResolvedSampling::greedy(),
        cached_tokens: 0,
        blocks: Vec::new(),
    })
}

/// `count` tokens of `slot`, which gets `blocks`.
pub fn work(slot: u32, count: u32, sample: bool, blocks: &[u32]) -> SlotWork {
    SlotWork { slot: SlotId(slot), count, sample, blocks: blocks.iter().map(|block| BlockId(*block)).collect() }
}

/// A plan.
pub fn plan(step: u64, release: &[u32], open: Vec<OpenSlot>, work: Vec<SlotWork>) -> Result<StepPlan> {
    let release = release.iter().map(|slot| SlotId(*slot)).collect();
    Ok(StepPlan { scheduler: ActorId::new("floor")?, session: 1, step, release, open, copies: Vec::new(), work })
}

/// Where spilled pages of this test go.
pub fn spill_root(stand: &Stand) -> PathBuf {
    stand.folder().join("pages")
}
