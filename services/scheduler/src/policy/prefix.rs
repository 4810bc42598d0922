//! Content keys of KV blocks: a chain of hashes, so that a block's key covers everything before it. The model's weights,
//! the tenant and the media that stand in the prompt are part of the chain. Must not know the pool.

use millrace_protocol::ready::MediaItem;

/// First 16 bytes of a BLAKE3 hash over the weights, the tenant and all content up to the block's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 16]);

/// The chain so far of one sequence: one hash for each full block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashChain {
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl HashChain {
    /// An empty chain for one model and one tenant: equal texts of different tenants share nothing, so that nobody can
    /// find out from timings what others asked.
    pub fn new(weights_hash: &str, tenant: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in [weights_hash, tenant] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Self { root: truncated(&hasher), hashes: Vec::new() }
    }

    /// Extends the chain over all full blocks of `tokens`. `media` are the items of the prompt.
    pub fn extend(&mut self, tokens: &[u32], media: &[MediaItem], block_tokens: usize) {
        for (index, block) in tokens.chunks_exact(block_tokens).enumerate().skip(self.hashes.len()) {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.hashes.last().unwrap_or(&self.root).0);
            let mut bytes = [0_u8; 256];
            for piece in block.chunks(bytes.len() / 4) {
                for (slot, token) in bytes.chunks_exact_mut(4).zip(piece) {
                    slot.copy_from_slice(&token.to_le_bytes());
                }
                hasher.update(&bytes[..piece.len() * 4]);
            }
            let start = index * block_tokens;
            // Placeholders of all images are the same token: what they show has to be told apart here.
            let first = media.partition_point(|item| (item.start + item.tokens) as usize <= start);
            for item in media[first..].iter().take_while(|item| (item.start as usize) < start + block_tokens) {
                hasher.update(&item.patches.hash);
                for number in [item.start, item.tokens, item.grid_h, item.grid_w] {
                    hasher.update(&number.to_le_bytes());
                }
            }
            self.hashes.push(truncated(&hasher));
        }
    }

    /// One hash for each full block so far.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

fn truncated(hasher: &blake3::Hasher) -> BlockHash {
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    BlockHash(short)
}

#[cfg(test)]
mod tests {
    use millrace_protocol::{ActorId, PageDtype, PageRef};
    use proptest::prelude::*;

    use super::*;

    fn chain(weights: &str, tenant: &str, tokens: &[u32], media: &[MediaItem]) -> Vec<BlockHash> {
        let mut chain = HashChain::new(weights, tenant);
        chain.extend(tokens, media, 4);
        chain.hashes().to_vec()
    }

    fn image(start: u32, content: u8) -> MediaItem {
        let patches = PageRef {
            node: ActorId::new("n").unwrap(),
            page: u64::from(content) + 7,
            dtype: PageDtype::F32,
            shape: vec![1],
            bytes: 4,
            hash: [content; 16],
        };
        MediaItem { start, tokens: 4, grid_h: 4, grid_w: 4, patches }
    }

    #[test]
    fn only_full_blocks_have_a_key() {
        let tokens: Vec<u32> = (0..11).collect();
        assert_eq!(chain("w", "t", &tokens, &[]).len(), 2);
        assert_eq!(chain("w", "t", &tokens[..3], &[]).len(), 0);
    }

    #[test]
    fn everything_that_decides_the_content_is_in_the_key() {
        let tokens = [9; 16];
        let base = chain("w", "t", &tokens, &[image(5, 1)]);
        assert_eq!(base, chain("w", "t", &tokens, &[image(5, 1)]));
        let differs_from = |other: Vec<BlockHash>| base.iter().zip(&other).position(|(a, b)| a != b);
        assert_eq!(differs_from(chain("v", "t", &tokens, &[image(5, 1)])), Some(0));
        assert_eq!(differs_from(chain("w", "u", &tokens, &[image(5, 1)])), Some(0));
        assert_eq!(differs_from(chain("w", "t", &tokens, &[image(5, 2)])), Some(1));
        assert_eq!(differs_from(chain("w", "t", &tokens, &[image(8, 1)])), Some(1));
        assert_eq!(differs_from(chain("w", "t", &tokens, &[])), Some(1));
        assert_ne!(chain("ab", "c", &tokens, &[]), chain("a", "bc", &tokens, &[]));
    }

    proptest! {
        #[test]
        fn growing_gives_the_chain_of_the_whole(tokens in prop::collection::vec(0_u32..3, 0..60), cut in 0_usize..60) {
            let cut = cut.min(tokens.len());
            let mut grown = HashChain::new("w", "t");
            grown.extend(&tokens[..cut], &[], 4);
            grown.extend(&tokens, &[], 4);
            prop_assert_eq!(grown.hashes().to_vec(), chain("w", "t", &tokens, &[]));
        }
    }
}
