//! Blocks in host memory: what preempted sequences computed and will need again is copied out when its place in the pool
//! is taken, and copied back when they are admitted. Only if that costs less than computing it again, by what the executor
//! measured. Owns numbers only. Must not choose who is preempted.
//!
//! Pages are promised when a sequence is preempted, to the leading blocks of its chain: a stored block is of use only if
//! everything before it can be found, too. A promise ends when the sequence is admitted or leaves.

use std::collections::HashMap;

use millrace_protocol::BlockId;
use millrace_protocol::engine::EngineCosts;
use millrace_protocol::plan::BlockCopy;

use super::blocks::Imbalance;
use super::prefix::BlockHash;

/// Whether copying a block out and back takes less time than computing its tokens again. What was not measured is not
/// swapped.
pub fn is_cheaper(costs: &EngineCosts, block_tokens: usize) -> bool {
    let recompute = costs.token_ns.saturating_mul(block_tokens as u64);
    let measured = costs.token_ns > 0 && costs.host_blocks > 0;
    measured && costs.swap_out_ns.saturating_add(costs.swap_in_ns) < recompute
}

/// Pages of host memory and what they are promised to.
#[derive(Debug, Default)]
pub struct Swap {
    pages: usize,
    free: Vec<u32>,
    /// Content to the number of waiting sequences that need it; each content has a page promised.
    wanted: HashMap<BlockHash, u32>,
    /// Content that was copied out, and its page.
    stored: HashMap<BlockHash, u32>,
    /// Copies that no plan has carried yet, in their order.
    copies: Vec<BlockCopy>,
    swapped_out: u64,
    swapped_in: u64,
}

impl Swap {
    /// As many pages as `costs` names, if swapping pays.
    pub fn new(costs: &EngineCosts, block_tokens: usize) -> Self {
        let pages = if is_cheaper(costs, block_tokens) { costs.host_blocks } else { 0 };
        Self { pages: pages as usize, free: (0..pages).rev().collect(), ..Self::default() }
    }

    /// A sequence was preempted: promises pages to the leading blocks of its chain. Returns how many got one.
    pub fn promise(&mut self, chain: &[BlockHash]) -> usize {
        for (promised, hash) in chain.iter().enumerate() {
            if self.wanted.len() == self.pages && !self.wanted.contains_key(hash) {
                return promised;
            }
            *self.wanted.entry(*hash).or_default() += 1;
        }
        chain.len()
    }

    /// Ends the promise that [`Self::promise`] made for these blocks.
    pub fn release(&mut self, chain: &[BlockHash]) {
        for hash in chain {
            let Some(count) = self.wanted.get_mut(hash) else { continue };
            *count -= 1;
            if *count == 0 {
                self.wanted.remove(hash);
                self.free.extend(self.stored.remove(hash));
            }
        }
    }

    /// The pool gives this block's place to other content: copies it out if it was promised a page.
    pub fn evicted(&mut self, block: BlockId, hash: &BlockHash) {
        if !self.wanted.contains_key(hash) || self.stored.contains_key(hash) {
            return;
        }
        if let Some(page) = self.free.pop() {
            self.stored.insert(*hash, page);
            self.copies.push(BlockCopy::Out { block, page });
            self.swapped_out += 1;
        }
    }

    /// Whether this content lies in host memory.
    pub fn holds(&self, hash: &BlockHash) -> bool {
        self.stored.contains_key(hash)
    }

    /// Copies content back into a block. `false`: it is not here.
    pub fn restore(&mut self, hash: &BlockHash, block: BlockId) -> bool {
        let Some(page) = self.stored.get(hash) else { return false };
        self.copies.push(BlockCopy::In { page: *page, block });
        self.swapped_in += 1;
        true
    }

    /// Takes the copies for the next plan.
    pub fn take_copies(&mut self) -> Vec<BlockCopy> {
        std::mem::take(&mut self.copies)
    }

    /// Blocks copied out and back so far.
    pub fn swapped(&self) -> (u64, u64) {
        (self.swapped_out, self.swapped_in)
    }

    /// Proves that pages are free or stored, once each, and that promises are those of the waiting sequences.
    ///
    /// # Errors
    /// [`Imbalance`] names what does not add up.
    pub fn check<'a>(&self, promised: impl IntoIterator<Item = &'a BlockHash>) -> Result<(), Imbalance> {
        let mut counted: HashMap<BlockHash, u32> = HashMap::new();
        for hash in promised {
            *counted.entry(*hash).or_default() += 1;
        }
        if counted != self.wanted || self.wanted.len() > self.pages {
            let (wanted, counted) = (self.wanted.len(), counted.len());
            return Err(Imbalance(format!("{wanted} contents have a page promised, {counted} are waited for")));
        }
        let mut pages: Vec<u32> = self.free.iter().chain(self.stored.values()).copied().collect();
        pages.sort_unstable();
        if !pages.iter().map(|page| *page as usize).eq(0..self.pages) {
            return Err(Imbalance(format!("{} host pages are accounted for as {pages:?}", self.pages)));
        }
        if let Some(hash) = self.stored.keys().find(|hash| !self.wanted.contains_key(*hash)) {
            return Err(Imbalance(format!("{hash:?} is stored for nobody")));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "swap_tests.rs"]
mod tests;
