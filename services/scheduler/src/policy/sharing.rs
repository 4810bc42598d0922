//! Equal beginnings that are computed right now: who would compute again what a plan that is out computes already waits
//! until it is there, if that saves at least half of its work. Nobody waits for a lower level, and nobody waits for what
//! is not planned yet, so the wait is as long as plans run ahead.

use std::collections::HashMap;

use super::planner::{Engine, Planner};
use super::prefix::BlockHash;
use super::sequence::SeqId;

/// Contents that running sequences compute or will compute, and who does.
#[derive(Debug, Default)]
pub(super) struct UnderWay(HashMap<BlockHash, SeqId>);

impl UnderWay {
    /// `id` will compute these blocks; what another one computes already stays that one's.
    pub fn begin(&mut self, id: SeqId, blocks: &[BlockHash]) {
        for hash in blocks {
            self.0.entry(*hash).or_insert(id);
        }
    }

    /// `id` has computed these blocks, or will not.
    pub fn end(&mut self, id: SeqId, blocks: &[BlockHash]) {
        for hash in blocks {
            if self.0.get(hash) == Some(&id) {
                self.0.remove(hash);
            }
        }
    }

    /// Everybody who computes something.
    pub fn owners(&self) -> impl Iterator<Item = SeqId> {
        self.0.values().copied()
    }

    /// Who computes this block.
    pub fn owner(&self, hash: &BlockHash) -> Option<SeqId> {
        self.0.get(hash).copied()
    }
}

/// Where a block's content can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// In the pool; `idle`: nobody holds it, taking it uses up an available block.
    Pool {
        /// Whether nobody holds it.
        idle: bool,
    },
    /// In host memory.
    Host,
}

impl Engine {
    /// Where this content can be had without computing it.
    pub fn source(&self, hash: &BlockHash) -> Option<Source> {
        match self.pool.peek(hash) {
            Some(held) => Some(Source::Pool { idle: held == super::blocks::Held::Idle }),
            None => self.swap.holds(hash).then_some(Source::Host),
        }
    }
}

impl Planner {
    /// Whether a newcomer had better wait for what others compute in plans that are out.
    pub(super) fn awaits_others(&self, id: SeqId) -> bool {
        let (Some(engine), Some(sequence)) = (self.engine.as_ref(), self.arena.get(id)) else { return false };
        let length = sequence.tokens.len();
        let most = (length - 1) / engine.block_tokens;
        let chain = sequence.chain.hashes();
        let wanted = &chain[..most.min(chain.len())];
        let there = wanted.iter().take_while(|hash| engine.source(hash).is_some()).count();
        let Some(owner) = wanted.get(there).and_then(|hash| engine.under_way.owner(hash)) else { return false };
        let Some(running) = self.arena.get(owner).filter(|other| other.rank.depth <= sequence.rank.depth) else {
            return false;
        };
        let planned = running.running().map_or(0, |running| running.planned / engine.block_tokens);
        let coming = wanted[there..].iter().take_while(|hash| engine.under_way.owner(hash) == Some(owner)).count();
        let coming = coming.min(planned.saturating_sub(there));
        coming > 0 && coming * engine.block_tokens * 2 >= length - there * engine.block_tokens
    }
}
