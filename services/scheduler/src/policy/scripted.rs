//! Test double of an executor that keeps the executor's side of the contract strictly: it refuses plans that contradict
//! its state, and its "keys and values" are hashes of everything before them, so that a wrong block is found at once.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use millrace_protocol::engine::EngineSpec;
use millrace_protocol::plan::{BlockCopy, OpenSlot};
use millrace_protocol::sampling::ResolvedSampling;
use millrace_protocol::step::SlotToken;
use millrace_protocol::{BlockId, JobId, ModelName, SlotId};

use super::{NewSequence, Plan};

pub const END: u32 = 999_999;

pub fn spec(blocks: u32, slots: u32) -> EngineSpec {
    EngineSpec {
        model: ModelName::new("m").unwrap(),
        weights_hash: "w".into(),
        blocks,
        block_tokens: 4,
        slots,
        step_tokens: 64,
        step_patches: 64,
        max_tokens: 4_096,
        vocab: 1_000_000,
        device: "scripted".into(),
    }
}

pub fn job(name: &str, prompt: impl IntoIterator<Item = u32>, max_tokens: u32) -> NewSequence {
    NewSequence {
        job: JobId::new(name).unwrap(),
        prompt: prompt.into_iter().collect(),
        answer: vec![],
        media: vec![],
        sampling: ResolvedSampling::greedy(),
        max_tokens,
        stop_token_ids: vec![END],
        may_stop_on_text: false,
        priority: 5,
        tenant: String::new(),
        deadline: None,
    }
}

/// The answer's token `n`: it depends on the job and `n` alone, as counter-based draws do. `ends_at`: the end-of-text token.
pub fn drawn(job: &JobId, n: usize, ends_at: Option<usize>) -> u32 {
    if ends_at == Some(n) {
        return END;
    }
    let mut hasher = DefaultHasher::new();
    (job.as_str(), n).hash(&mut hasher);
    (hasher.finish() % 1_000) as u32
}

struct Slot {
    job: JobId,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    position: usize,
    table: Vec<BlockId>,
    media: Vec<(u32, u32)>,
}

/// One engine.
pub struct Scripted {
    spec: EngineSpec,
    kv: Vec<u64>,
    host: HashMap<u32, Vec<u64>>,
    /// Blocks copied out and back.
    pub copied: [usize; 2],
    slots: HashMap<SlotId, Slot>,
    /// Where answers end, by job.
    pub ends: HashMap<String, usize>,
    plans: VecDeque<Plan>,
    /// Tokens of the last step.
    pub last_tokens: usize,
}

impl Scripted {
    pub fn new(spec: EngineSpec) -> Self {
        let kv = vec![0; (spec.blocks * spec.block_tokens) as usize];
        Self {
            spec,
            kv,
            host: HashMap::new(),
            copied: [0; 2],
            slots: HashMap::new(),
            ends: HashMap::new(),
            plans: VecDeque::new(),
            last_tokens: 0,
        }
    }

    pub fn send(&mut self, plan: Plan) {
        self.plans.push_back(plan);
    }

    pub fn busy(&self) -> bool {
        !self.plans.is_empty()
    }

    /// Runs the oldest plan.
    pub fn step(&mut self) -> Option<(Vec<SlotToken>, Duration)> {
        let plan = self.plans.pop_front()?;
        for slot in plan.release {
            self.slots.remove(&slot).unwrap_or_else(|| panic!("{slot:?} is released but not open"));
        }
        for copy in plan.copies {
            let place = |block: BlockId| block.0 as usize * 4..block.0 as usize * 4 + 4;
            match copy {
                BlockCopy::Out { block, page } => {
                    self.host.insert(page, self.kv[place(block)].to_vec());
                    self.copied[0] += 1;
                }
                BlockCopy::In { page, block } => {
                    self.kv[place(block)].copy_from_slice(&self.host[&page]);
                    self.copied[1] += 1;
                }
            }
        }
        for open in plan.open {
            self.open(open);
        }
        let total: u32 = plan.work.iter().map(|work| work.count).sum();
        assert!(total > 0 && total <= self.spec.step_tokens, "{total} tokens in a step");
        self.last_tokens = total as usize;
        let mut seen = std::collections::HashSet::new();
        let mut patches = Vec::new();
        let mut tokens = Vec::new();
        for work in plan.work {
            assert!(seen.insert(work.slot), "{:?} works twice in a step", work.slot);
            let slot = self.slots.get_mut(&work.slot).expect("an open slot");
            slot.table.extend(&work.blocks);
            let end = slot.position + work.count as usize;
            assert!(end <= slot.tokens.len(), "{} computes tokens that do not exist", slot.job);
            assert!(end.div_ceil(4) <= slot.table.len(), "{} has no block for its tokens", slot.job);
            assert_eq!(work.sample, end == slot.tokens.len(), "{} draws at the wrong place", slot.job);
            patches.extend(slot.media.iter().filter(|(start, _)| (slot.position..end).contains(&(*start as usize))));
            for position in slot.position..end {
                let mut before = 0;
                for (earlier, token) in slot.tokens[..=position].iter().enumerate() {
                    let place = slot.table[earlier / 4].0 as usize * 4 + earlier % 4;
                    let mut hasher = DefaultHasher::new();
                    (before, token).hash(&mut hasher);
                    before = hasher.finish();
                    if earlier == position {
                        self.kv[place] = before;
                    }
                    assert_eq!(self.kv[place], before, "{}: foreign content at token {earlier}", slot.job);
                }
            }
            slot.position = end;
            if work.sample {
                let n = slot.tokens.len() - slot.prompt_tokens;
                let token = drawn(&slot.job, n, self.ends.get(slot.job.as_str()).copied());
                slot.tokens.push(token);
                tokens.push(SlotToken { slot: work.slot, token, logprobs: None });
            }
        }
        let sum: u32 = patches.iter().map(|(_, cost)| *cost).sum();
        assert!(sum <= self.spec.step_patches || patches.len() == 1, "{sum} patches in a step");
        Some((tokens, Duration::from_millis(10)))
    }

    fn open(&mut self, open: OpenSlot) {
        assert_eq!(open.blocks.len() * 4, open.cached_tokens as usize);
        assert!(open.slot.0 < self.spec.slots, "{:?} does not exist", open.slot);
        let slot = Slot {
            job: open.job,
            prompt_tokens: open.prompt_tokens as usize,
            tokens: open.tokens,
            position: open.cached_tokens as usize,
            table: open.blocks,
            media: open.media.iter().map(|item| (item.start, item.grid_h * item.grid_w)).collect(),
        };
        assert!(self.slots.insert(open.slot, slot).is_none(), "{:?} is open already", open.slot);
    }
}
