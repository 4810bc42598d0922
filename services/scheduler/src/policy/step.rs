//! What one step computes: decodes first, one token each; then prompt chunks and newcomers, in order of level, as far as
//! the budgets for tokens, sequences and patches reach. Must not know outputs.

use std::time::Duration;

use millrace_protocol::BlockId;
use millrace_protocol::plan::{OpenSlot, SlotWork};

use super::planner::{Entry, Event, Events, Outstanding, Plan, Planner};
use super::sequence::{Phase, Running, SeqId, Sequence, patches};
use super::wire::base_bytes;

/// A step while it is put together.
#[derive(Debug)]
pub(super) struct Draft {
    pub tokens_left: usize,
    pub patches_left: u32,
    pub patches_used: bool,
    /// Bytes that newcomers may still take in the encoded plan.
    pub bytes_left: usize,
    pub open: Vec<(SeqId, OpenSlot)>,
    pub work: Vec<Entry>,
    pub blocks: Vec<Vec<BlockId>>,
    /// Blocks that admitted prompts will still need: they count as taken when somebody asks for admission.
    pub debt_blocks: usize,
    /// Set once the head of the queue did not fit: nobody overtakes it.
    pub admission_closed: bool,
    /// Who lost its slot while the step was put together.
    pub preempted: Vec<SeqId>,
}

/// A chunk that fits the budgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub count: usize,
    pub patches: u32,
    pub next_media: usize,
}

impl Planner {
    /// The next step, or `None` if there is nothing to compute, no engine, or enough plans are out.
    pub fn plan(&mut self, now: Duration, events: &mut Events) -> Option<Plan> {
        self.expire(now, events);
        self.expire_hopeless(now, events);
        self.waiting.age(now);
        let engine = self.engine.as_ref()?;
        if self.outstanding.len() >= self.limits.run_ahead.max(1) {
            return None;
        }
        let mut draft = Draft {
            tokens_left: engine.step_tokens,
            patches_left: engine.step_patches,
            patches_used: false,
            bytes_left: self.limits.plan_bytes.saturating_sub(base_bytes(engine)),
            open: Vec::new(),
            work: Vec::with_capacity(self.running.len() + 4),
            blocks: Vec::with_capacity(self.running.len() + 4),
            debt_blocks: 0,
            admission_closed: false,
            preempted: Vec::new(),
        };
        let prompts = self.plan_decodes(&mut draft, now);
        self.plan_prompts(&mut draft, &prompts, now, events);
        events.extend(draft.preempted.drain(..).map(|id| (id, Event::Preempted)));
        if draft.work.is_empty() {
            return None;
        }
        let engine = self.engine.as_mut()?;
        let (release, copies) = (std::mem::take(&mut engine.release), engine.swap.take_copies());
        let work = draft.work.iter().zip(draft.blocks).map(|(entry, blocks)| SlotWork {
            slot: entry.slot,
            count: entry.count as u32,
            sample: entry.sample,
            blocks,
        });
        let open = draft.open.into_iter().map(|(_, open)| open).collect();
        let plan = Plan { release, copies, open, work: work.collect() };
        self.outstanding.push_back(Outstanding { entries: draft.work });
        Some(plan)
    }

    /// Plans a token for every sequence that decodes; the sequences that still have prompt to compute are returned.
    fn plan_decodes(&mut self, draft: &mut Draft, now: Duration) -> Vec<SeqId> {
        let mut prompts = Vec::new();
        let mut place = 0;
        while let Some(&(_, id)) = self.running.get(place) {
            let block_tokens = self.block_tokens();
            let Some((sequence, running)) = self.running_parts(id) else {
                place += 1;
                continue;
            };
            let to_compute = sequence.placed(running) - running.planned;
            if to_compute != 1 || running.next_media < sequence.new.media.len() {
                draft.debt_blocks += sequence.blocks_to_start(block_tokens).saturating_sub(running.table.len());
                prompts.push(id);
            } else if sequence.placed(running) - sequence.prompt_tokens < sequence.new.max_tokens as usize {
                let chunk = Chunk { count: 1, patches: 0, next_media: running.next_media };
                self.add_work(draft, id, chunk, now);
            }
            // Whoever stood here may have been preempted to make room; then the next one moved up.
            if self.running.get(place).is_some_and(|(_, now_here)| *now_here == id) {
                place += 1;
            }
        }
        prompts
    }

    /// Fills the rest of the step: prompts that have begun and newcomers, the higher level first.
    fn plan_prompts(&mut self, draft: &mut Draft, prompts: &[SeqId], now: Duration, events: &mut Events) {
        let mut prompts = prompts.iter().copied().peekable();
        while draft.tokens_left > 0 {
            let begun = prompts.peek().and_then(|id| self.arena.get(*id)).map(|sequence| sequence.rank.depth);
            let head = if draft.admission_closed { None } else { self.waiting.head() };
            let head_depth = head.and_then(|id| self.waiting.rank(id)).map(|rank| rank.depth);
            match (begun, head, head_depth) {
                (Some(begun), Some(head), Some(waiting)) if waiting < begun => self.admit(draft, head, now, events),
                (Some(_), ..) => {
                    let Some(id) = prompts.next() else { return };
                    if let Some(chunk) = self.next_chunk(draft, id) {
                        self.add_work(draft, id, chunk, now);
                    }
                }
                // Its place in the list went to a preempted sequence.
                (None, ..) if prompts.peek().is_some() => drop(prompts.next()),
                (None, Some(head), _) => self.admit(draft, head, now, events),
                (None, None, _) => return,
            }
        }
    }

    fn next_chunk(&self, draft: &Draft, id: SeqId) -> Option<Chunk> {
        let sequence = self.arena.get(id)?;
        let running = sequence.running()?;
        let left = sequence.placed(running) - running.planned;
        chunk(draft, sequence, running.planned, left, running.next_media)
    }

    /// Adds a sequence's chunk to the step, with the blocks it needs. `false`: it was itself preempted for want of blocks.
    pub(super) fn add_work(&mut self, draft: &mut Draft, id: SeqId, chunk: Chunk, now: Duration) -> bool {
        let Some(blocks) = self.grow_table(draft, id, chunk.count, now) else { return false };
        let Some(sequence) = self.arena.get_mut(id) else { return false };
        let most = sequence.new.max_tokens as usize;
        let Phase::Running(running) = &mut sequence.phase else { return false };
        running.planned += chunk.count;
        running.next_media = chunk.next_media;
        let placed = sequence.tokens.len() + running.in_flight;
        let sample = running.planned == placed && placed - sequence.prompt_tokens < most;
        running.in_flight += usize::from(sample);
        draft.tokens_left -= chunk.count;
        draft.patches_left = draft.patches_left.saturating_sub(chunk.patches);
        draft.patches_used |= chunk.patches > 0;
        draft.work.push(Entry { seq: id, epoch: sequence.epoch, slot: running.slot, count: chunk.count, sample });
        draft.blocks.push(blocks);
        true
    }

    /// Allocates blocks for the next `count` tokens, one at a time, at the expense of the last in rank.
    fn grow_table(&mut self, draft: &mut Draft, id: SeqId, count: usize, now: Duration) -> Option<Vec<BlockId>> {
        let block_tokens = self.block_tokens();
        let (_, running) = self.running_parts(id)?;
        let missing = (running.planned + count).div_ceil(block_tokens).saturating_sub(running.table.len());
        let mut added = Vec::with_capacity(missing);
        while added.len() < missing {
            if let Some(block) = self.engine.as_mut()?.allocate() {
                added.push(block.id());
                let Phase::Running(running) = &mut self.arena.get_mut(id)?.phase else { return None };
                running.table.push(block);
                continue;
            }
            let (_, victim) = *self.running.last()?;
            self.preempt(draft, victim, now);
            if victim == id {
                return None;
            }
        }
        if count > 1 {
            draft.debt_blocks = draft.debt_blocks.saturating_sub(missing);
        }
        Some(added)
    }

    /// Takes a running sequence out of the step and lets it wait again; its full blocks stay in the prefix cache.
    pub(super) fn preempt(&mut self, draft: &mut Draft, victim: SeqId, now: Duration) {
        if let Some(place) = draft.work.iter().position(|entry| entry.seq == victim) {
            let entry = draft.work.remove(place);
            draft.blocks.remove(place);
            draft.tokens_left += entry.count;
        }
        let opened_here =
            draft.open.iter().position(|(id, _)| *id == victim).map(|place| draft.open.remove(place).1.slot);
        self.back_to_waiting(victim, now);
        if let (Some(slot), Some(engine)) = (opened_here, self.engine.as_mut()) {
            // The executor never heard of it, so there is nothing to forget; an earlier holder's release stands.
            if let Some(place) = engine.release.iter().rposition(|released| *released == slot) {
                engine.release.remove(place);
            }
        }
        self.preemptions += 1;
        draft.preempted.push(victim);
    }

    pub(super) fn block_tokens(&self) -> usize {
        self.engine.as_ref().map_or(1, |engine| engine.block_tokens)
    }

    fn running_parts(&self, id: SeqId) -> Option<(&Sequence, &Running)> {
        let sequence = self.arena.get(id)?;
        Some((sequence, sequence.running()?))
    }
}

/// The longest piece of the next `left` tokens from `start` that fits the budgets. Media whose first token it reaches are
/// encoded in this step; one item larger than the whole patch budget may be the only one.
pub(super) fn chunk(draft: &Draft, sequence: &Sequence, start: usize, left: usize, next_media: usize) -> Option<Chunk> {
    let mut chunk = Chunk { count: left.min(draft.tokens_left), patches: 0, next_media };
    let mut patches_left = draft.patches_left;
    let mut first = !draft.patches_used;
    while let Some(item) = sequence.new.media.get(chunk.next_media) {
        let item_start = item.start as usize;
        if item_start >= start + chunk.count {
            break;
        }
        let cost = patches(item);
        if cost > patches_left && !first {
            chunk.count = item_start.saturating_sub(start);
            break;
        }
        patches_left = patches_left.saturating_sub(cost);
        first = false;
        chunk.patches = chunk.patches.saturating_add(cost);
        chunk.next_media += 1;
    }
    (chunk.count > 0).then_some(chunk)
}
