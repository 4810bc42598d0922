//! Content keys of KV blocks: a chain of hashes, so that a block's key covers everything before it. The model's weights,
//! the tenant and the media that stand in the prompt are part of the chain. And the summary of such keys that schedulers
//! publish, so that a job can go where its beginning is cached. Must not know the pool.

use serde::{Deserialize, Serialize};

use crate::ready::{MediaItem, Normalise};

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
                for number in item.normalise.iter().flat_map(Normalise::bits) {
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

/// Which content keys a scheduler can find: a Bloom filter as hexadecimal digits, at most [`MOST_SUMMARY_BITS`] bits. It may
/// name a key that is not there (about one in a hundred up to 1,600 keys, more beyond), never miss one that is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PrefixSummary(String);

/// Most bits of a [`PrefixSummary`]: 4 KiB of digits.
pub const MOST_SUMMARY_BITS: usize = 1 << 14;

/// Bits for each key, before rounding up to a power of two.
const BITS_PER_KEY: usize = 8;

impl PrefixSummary {
    /// A summary of `count` keys.
    pub fn of<'a>(count: usize, keys: impl IntoIterator<Item = &'a BlockHash>) -> Self {
        if count == 0 {
            return Self::default();
        }
        let bits = (count * BITS_PER_KEY).next_power_of_two().clamp(64, MOST_SUMMARY_BITS);
        let mut digits = vec![0_u8; bits / 4];
        for place in keys.into_iter().flat_map(|key| key.places(bits)) {
            digits[place / 4] |= 1 << (place % 4);
        }
        Self(digits.into_iter().filter_map(|digit| char::from_digit(u32::from(digit), 16)).collect())
    }

    /// Leading keys of a chain that seem to be there.
    pub fn leading(&self, chain: &[BlockHash]) -> usize {
        let digits = self.0.as_bytes();
        // A foreign beacon may hold anything.
        if digits.is_empty() || !digits.len().is_power_of_two() {
            return 0;
        }
        let is_set = |place: usize| {
            let digit = digits.get(place / 4).and_then(|digit| char::from(*digit).to_digit(16));
            digit.is_some_and(|digit| digit & (1 << (place % 4)) != 0)
        };
        chain.iter().take_while(|key| key.places(digits.len() * 4).into_iter().all(is_set)).count()
    }
}

impl BlockHash {
    /// Four places in a filter of `bits` bits, a power of two: the key is a hash already.
    fn places(&self, bits: usize) -> [usize; 4] {
        let words = self.0.as_chunks::<4>().0;
        std::array::from_fn(|n| u32::from_le_bytes(words[n]) as usize & (bits - 1))
    }
}

fn truncated(hasher: &blake3::Hasher) -> BlockHash {
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    BlockHash(short)
}

#[cfg(test)]
mod tests {
    use crate::{ActorId, PageDtype, PageRef};
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
        MediaItem { start, tokens: 4, grid_h: 4, grid_w: 4, patches, normalise: None }
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
        let normalised =
            |mean| MediaItem { normalise: Some(Normalise { mean: [mean; 3], std: [0.5; 3] }), ..image(5, 1) };
        let half = chain("w", "t", &tokens, &[normalised(0.5)]);
        assert_eq!(differs_from(half.clone()), Some(1));
        assert_ne!(half, chain("w", "t", &tokens, &[normalised(0.25)]));
        assert_ne!(chain("ab", "c", &tokens, &[]), chain("a", "bc", &tokens, &[]));
    }

    #[test]
    fn a_summary_holds_every_key_and_few_others() {
        let keys = chain("w", "t", &(0..4 * 1_600).collect::<Vec<_>>(), &[]);
        let others = chain("w", "u", &(0..4 * 4_000).collect::<Vec<_>>(), &[]);
        for count in [1, 7, 8, 9, 500, 1_600] {
            let summary = PrefixSummary::of(count, &keys[..count]);
            assert!(summary.leading(&keys) >= count, "{count}");
            let wrong = others.iter().filter(|key| summary.leading(&[**key]) > 0).count();
            assert!(wrong <= others.len() / 25, "{wrong} of {} keys are named wrongly beside {count}", others.len());
            assert!(summary.0.len() <= MOST_SUMMARY_BITS / 4);
        }
        assert_eq!(PrefixSummary::of(0, []).leading(&keys), 0);
        assert_eq!(PrefixSummary("abc".into()).leading(&keys), 0, "no power of two");
        assert_eq!(PrefixSummary("zzzz".into()).leading(&keys), 0, "no digits");
        let text = serde_json::to_string(&PrefixSummary::of(3, &keys[..3])).unwrap();
        assert_eq!(serde_json::from_str::<PrefixSummary>(&text).unwrap().leading(&keys), 3);
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
