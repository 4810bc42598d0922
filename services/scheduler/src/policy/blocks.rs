//! The KV block pool: reference counts, the prefix cache, and least-recently-used eviction of cached blocks that
//! nobody holds. Owns numbers only, no memory. Must not know sequences.
//!
//! A held block is a [`Block`] value. It cannot be copied, so giving one back twice does not compile; losing one is
//! found by [`BlockPool::check`].

use std::collections::{BTreeMap, HashMap};

use millrace_protocol::BlockId;

use super::prefix::BlockHash;

/// One reference to a block. Give it back with [`BlockPool::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped reference is a leaked block"]
pub struct Block(BlockId);

impl Block {
    /// The block's place in the executor's pool.
    pub fn id(&self) -> BlockId {
        self.0
    }
}

#[derive(Debug, Clone, Default)]
struct State {
    refs: u32,
    /// Content under which the block can be found.
    hash: Option<BlockHash>,
    /// Place in the eviction order, while cached and unreferenced.
    idle_since: u64,
}

/// All blocks of one engine.
#[derive(Debug)]
pub struct BlockPool {
    states: Vec<State>,
    /// Blocks without content, the next one last.
    free: Vec<BlockId>,
    /// Content to block, referenced or not.
    cached: HashMap<BlockHash, BlockId>,
    /// Cached blocks that nobody references, the longest idle first.
    idle: BTreeMap<u64, BlockId>,
    clock: u64,
    evictions: u64,
}

/// A pool whose accounts do not add up: a bug, named for the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("block accounts are wrong: {0}")]
pub struct Imbalance(pub String);

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: u32) -> Self {
        Self {
            states: vec![State::default(); blocks as usize],
            free: (0..blocks).rev().map(BlockId).collect(),
            cached: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            evictions: 0,
        }
    }

    /// Blocks in the pool.
    pub fn total(&self) -> usize {
        self.states.len()
    }

    /// Blocks that [`Self::allocate`] could hand out now: free ones and evictable ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that hold reusable content, referenced or not.
    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    /// Cached blocks thrown out for new content so far.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Contents that can be found.
    pub fn contents(&self) -> impl Iterator<Item = &BlockHash> {
        self.cached.keys()
    }

    /// Whether somebody else holds this block too.
    pub fn is_shared(&self, block: &Block) -> bool {
        self.states.get(block.0.0 as usize).is_some_and(|state| state.refs > 1)
    }

    /// Takes an empty block, evicting the longest idle cached one if none is free. `None`: every block is held.
    pub fn allocate(&mut self) -> Option<Block> {
        self.allocate_evicting().map(|(block, _)| block)
    }

    /// As [`Self::allocate`]; also the content that was evicted for it, which the block still holds until it is written.
    pub fn allocate_evicting(&mut self) -> Option<(Block, Option<BlockHash>)> {
        let (id, evicted) = match self.free.pop() {
            Some(id) => (id, None),
            None => self.evict()?,
        };
        self.states[id.0 as usize].refs = 1;
        Some((Block(id), evicted))
    }

    /// Takes a further reference to the block with this content.
    pub fn lookup(&mut self, hash: &BlockHash) -> Option<Block> {
        let id = *self.cached.get(hash)?;
        let state = &mut self.states[id.0 as usize];
        if state.refs == 0 {
            self.idle.remove(&state.idle_since);
        }
        state.refs += 1;
        Some(Block(id))
    }

    /// Whether content is cached, and whether somebody holds it, without taking a reference.
    pub fn peek(&self, hash: &BlockHash) -> Option<Held> {
        let id = self.cached.get(hash)?;
        Some(if self.states[id.0 as usize].refs == 0 { Held::Idle } else { Held::Referenced })
    }

    /// Records what a held block now contains. If another block already has this content, that one stays the cached one.
    pub fn register(&mut self, block: &Block, hash: BlockHash) {
        let state = &mut self.states[block.0.0 as usize];
        if state.hash.is_none() && !self.cached.contains_key(&hash) {
            state.hash = Some(hash);
            self.cached.insert(hash, block.0);
        }
    }

    /// Forgets what a held block contains: its content is not to be trusted.
    pub fn unregister(&mut self, block: &Block) {
        if let Some(hash) = self.states[block.0.0 as usize].hash.take() {
            self.cached.remove(&hash);
        }
    }

    /// Gives a reference back. Cached content stays findable until its block is needed.
    pub fn release(&mut self, block: Block) {
        let state = &mut self.states[block.0.0 as usize];
        state.refs -= 1;
        if state.refs > 0 {
            return;
        }
        if state.hash.is_some() {
            self.clock += 1;
            state.idle_since = self.clock;
            self.idle.insert(self.clock, block.0);
        } else {
            self.free.push(block.0);
        }
    }

    /// Gives a whole table back, its end first, so that the shared beginning of a prompt is evicted last.
    pub fn release_table(&mut self, table: &mut Vec<Block>) {
        while let Some(block) = table.pop() {
            self.release(block);
        }
    }

    /// Proves that every block is in exactly one place and that the references counted are those in `tables`.
    ///
    /// # Errors
    /// [`Imbalance`] names the first block that is lost, held twice over, or both free and held.
    pub fn check<'a>(&self, tables: impl IntoIterator<Item = &'a Block>) -> Result<(), Imbalance> {
        let mut held = vec![0_u32; self.states.len()];
        for block in tables {
            let count = held.get_mut(block.0.0 as usize);
            *count.ok_or_else(|| Imbalance(format!("{:?} is not of this pool", block.0)))? += 1;
        }
        let mut resting = vec![0_u32; self.states.len()];
        for id in self.free.iter().chain(self.idle.values()) {
            resting[id.0 as usize] += 1;
        }
        for (index, state) in self.states.iter().enumerate() {
            if held[index] != state.refs {
                return Err(Imbalance(format!(
                    "block {index} has {} references, {} are held",
                    state.refs, held[index]
                )));
            }
            if resting[index] != u32::from(state.refs == 0) {
                return Err(Imbalance(format!(
                    "block {index} rests {} times with {} references",
                    resting[index], state.refs
                )));
            }
            if let Some(hash) = &state.hash
                && self.cached.get(hash) != Some(&BlockId(index as u32))
            {
                return Err(Imbalance(format!("block {index} has content that does not lead to it")));
            }
        }
        let findable = self.states.iter().filter(|state| state.hash.is_some()).count();
        if findable != self.cached.len() {
            return Err(Imbalance(format!("{} contents cached, {findable} blocks hold one", self.cached.len())));
        }
        Ok(())
    }

    fn evict(&mut self) -> Option<(BlockId, Option<BlockHash>)> {
        let (_, id) = self.idle.pop_first()?;
        let hash = self.states[id.0 as usize].hash.take();
        if let Some(hash) = &hash {
            self.cached.remove(hash);
        }
        self.evictions += 1;
        Some((id, hash))
    }
}

/// Whether a cached block is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Nobody holds it: taking it uses up an available block.
    Idle,
    /// Somebody holds it: sharing it costs nothing.
    Referenced,
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
