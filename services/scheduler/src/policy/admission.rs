//! Who gets a slot: the head of the queue, if the pool can hold its whole prompt beside what is already promised and the
//! watermark; at the expense of lower levels if its own priority is higher. Must not form chunks of others.

use std::time::Duration;

use millrace_protocol::plan::OpenSlot;

use super::blocks::Block;
use super::planner::{Engine, Event, Events, Planner};
use super::prefix::BlockHash;
use super::queue::depth;
use super::sequence::{Phase, Running, SeqId};
use super::sharing::Source;
use super::step::{Chunk, Draft, chunk};
use super::wire::open_bytes;

/// What admission of one sequence takes.
struct Need {
    cached_blocks: usize,
    /// Blocks that must be available: new ones, and cached ones that nobody else holds.
    blocks: usize,
    /// New blocks that later chunks will take.
    later_blocks: usize,
    chunk: Chunk,
    own_depth: u8,
    /// What it may weigh in the plan.
    bytes: usize,
}

impl Planner {
    /// Admits the head of the queue with its first chunk, or closes admission for this step.
    pub(super) fn admit(&mut self, draft: &mut Draft, id: SeqId, now: Duration, events: &mut Events) {
        if self.is_hopeless(id, now) {
            return self.end_late(id, events);
        }
        let Some(need) = self.fitting(draft, id, now) else {
            draft.admission_closed = true;
            return;
        };
        draft.debt_blocks += need.later_blocks;
        self.open(draft, id, &need, now, events);
    }

    /// What admission takes, once there is room for it.
    fn fitting(&mut self, draft: &mut Draft, id: SeqId, now: Duration) -> Option<Need> {
        if self.waits_for_proof(id) || self.awaits_others(id) {
            return None;
        }
        let need = self.need(draft, id)?;
        if need.bytes > draft.bytes_left {
            return None;
        }
        if self.fits(draft, &need) {
            return Some(need);
        }
        if !self.make_room(draft, &need, now) {
            return None;
        }
        // The victims may have held cached blocks that this sequence shares: they count as needed now.
        self.need(draft, id).filter(|need| self.fits(draft, need))
    }

    /// Whether slots and blocks are free for it, beside what is promised to others.
    fn fits(&self, draft: &Draft, need: &Need) -> bool {
        let Some(engine) = &self.engine else { return false };
        let free_slot = self.running.len() < engine.max_running;
        free_slot && engine.pool.available() >= need.blocks + self.reserve(draft, self.running.len())
    }

    /// Blocks that stay free when `running` others run: a sequence alone always fits, it was checked against the pool.
    fn reserve(&self, draft: &Draft, running: usize) -> usize {
        let watermark = self.engine.as_ref().map_or(0, |engine| engine.watermark_blocks);
        if running == 0 { 0 } else { watermark + draft.debt_blocks }
    }

    /// Whether this sequence and one that runs are both suspected of bringing engines down.
    fn waits_for_proof(&self, id: SeqId) -> bool {
        let suspect = |id: SeqId| self.arena.get(id).is_some_and(|sequence| sequence.losses > 0);
        suspect(id) && self.running.iter().any(|(_, running)| suspect(*running))
    }

    fn need(&self, draft: &Draft, id: SeqId) -> Option<Need> {
        let engine = self.engine.as_ref()?;
        let sequence = self.arena.get(id)?;
        let length = sequence.tokens.len();
        // At least one token has to be computed: the next one is drawn after it.
        let most = (length - 1) / engine.block_tokens;
        let sources = sequence.chain.hashes().iter().take(most).map_while(|hash| engine.source(hash));
        let (mut cached_blocks, mut taken) = (0, 0);
        for source in sources {
            cached_blocks += 1;
            // Idle blocks are taken as they are, those in host memory need an empty one.
            taken += usize::from(source != Source::Pool { idle: false });
        }
        let cached = cached_blocks * engine.block_tokens;
        let media = &sequence.new.media;
        let next_media = media.partition_point(|item| (item.start + item.tokens) as usize <= cached);
        let chunk = chunk(draft, sequence, cached, length - cached, next_media)?;
        let new_blocks = sequence.blocks_to_start(engine.block_tokens) - cached_blocks;
        let first_blocks = (cached + chunk.count).div_ceil(engine.block_tokens) - cached_blocks;
        Some(Need {
            cached_blocks,
            blocks: new_blocks + taken,
            later_blocks: new_blocks - first_blocks,
            chunk,
            own_depth: depth(sequence.new.priority),
            bytes: open_bytes(engine, sequence, length),
        })
    }

    /// Preempts lower levels for it, the lowest first, but only if that is enough.
    fn make_room(&mut self, draft: &mut Draft, need: &Need, now: Duration) -> bool {
        let Some(engine) = &self.engine else { return false };
        let mut available = engine.pool.available();
        let mut left = self.running.len();
        for (rank, id) in self.running.iter().rev() {
            if rank.depth <= need.own_depth {
                return false;
            }
            left -= 1;
            let table = self.arena.get(*id).and_then(|victim| victim.running()).map(|running| &running.table);
            available += table.map_or(0, |table| table.iter().filter(|block| !engine.pool.is_shared(block)).count());
            if left < engine.max_running && available >= need.blocks + self.reserve(draft, left) {
                break;
            }
        }
        if left == self.running.len() || available < need.blocks + self.reserve(draft, left) {
            return false;
        }
        while self.running.len() > left
            && let Some((_, victim)) = self.running.last().copied()
        {
            self.preempt(draft, victim, now);
        }
        true
    }

    fn open(&mut self, draft: &mut Draft, id: SeqId, need: &Need, now: Duration, events: &mut Events) {
        let Some(rank) = self.waiting.remove(id) else { return };
        let (Some(engine), Some(sequence)) = (self.engine.as_mut(), self.arena.get_mut(id)) else { return };
        let Some(slot) = engine.slots.pop() else { return };
        let table = engine.take_cached(&sequence.chain.hashes()[..need.cached_blocks]);
        let promised = std::mem::take(&mut sequence.promised);
        engine.swap.release(&sequence.chain.hashes()[..promised]);
        engine.under_way.begin(id, &sequence.chain.hashes()[table.len()..]);
        draft.bytes_left = draft.bytes_left.saturating_sub(need.bytes);
        let cached = table.len() * engine.block_tokens;
        let again = sequence.cached_tokens.is_some();
        sequence.cached_tokens.get_or_insert(cached.min(sequence.prompt_tokens));
        if let Phase::Waiting { since } = sequence.phase {
            sequence.waited += now.saturating_sub(since);
        }
        sequence.rank = rank;
        let owed = std::mem::take(&mut sequence.uncharged) + (sequence.tokens.len() - cached) as u64;
        let tenant = sequence.tenant;
        draft.open.push((
            id,
            OpenSlot {
                slot,
                job: sequence.new.job.clone(),
                tokens: sequence.tokens.clone(),
                prompt_tokens: sequence.prompt_tokens as u32,
                media: sequence.new.media.clone(),
                sampling: sequence.new.sampling.clone(),
                cached_tokens: cached as u32,
                blocks: table.iter().map(|block| block.id()).collect(),
            },
        ));
        sequence.phase = Phase::Running(Running {
            slot,
            registered: table.len(),
            table,
            planned: cached,
            confirmed: cached,
            proven: false,
            in_flight: 0,
            next_media: need.chunk.next_media,
        });
        let place = self.running.partition_point(|other| *other < (rank, id));
        self.running.insert(place, (rank, id));
        self.waiting.charge(tenant, owed);
        events.push((id, Event::Admitted { cached_tokens: cached, again }));
        self.add_work(draft, id, need.chunk, now);
    }
}

impl Engine {
    /// An empty block; what it held is copied out first if somebody will need it again.
    pub(super) fn allocate(&mut self) -> Option<Block> {
        let (block, evicted) = self.pool.allocate_evicting()?;
        if let Some(hash) = evicted {
            self.swap.evicted(block.id(), &hash);
        }
        Some(block)
    }

    /// Blocks with these contents, from the pool or host memory. Those of the pool are taken first: making room for the
    /// others must not evict them.
    fn take_cached(&mut self, hashes: &[BlockHash]) -> Vec<Block> {
        let mut found: Vec<Option<Block>> = hashes.iter().map(|hash| self.pool.lookup(hash)).collect();
        for (place, hash) in found.iter_mut().zip(hashes).filter(|(place, _)| place.is_none()) {
            let Some(block) = self.swap.holds(hash).then(|| self.allocate()).flatten() else { break };
            self.swap.restore(hash, block.id());
            self.pool.register(&block, *hash);
            *place = Some(block);
        }
        let whole = found.iter().take_while(|place| place.is_some()).count();
        let mut table: Vec<Block> = Vec::with_capacity(whole);
        let mut rest = Vec::new();
        for (index, block) in found.into_iter().enumerate() {
            if index < whole { table.extend(block) } else { rest.extend(block) }
        }
        self.pool.release_table(&mut rest);
        table
    }
}
