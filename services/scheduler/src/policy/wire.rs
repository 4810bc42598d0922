//! Upper bounds of what plans weigh on the wire, so that no plan is larger than a message: newcomers are spread over
//! steps, and one that never fits is refused at once. Must not encode anything.

use millrace_protocol::{ErrorCode, JobError};

use super::planner::{Engine, Planner};
use super::sequence::Sequence;

/// Session, step, sender and the lengths of the lists.
const HEAD_BYTES: usize = 256;
/// One sequence's work without new blocks, and its release: slot, count, flag, length.
const WORK_BYTES: usize = 24;
/// One new block in a table, what it held copied out, what it will hold copied in.
const BLOCK_BYTES: usize = 27;
/// A newcomer without tokens, blocks, media and biases: ids and how tokens are drawn.
const OPEN_BYTES: usize = 512;
/// One media item: a reference with its node, shape and hash.
const MEDIA_BYTES: usize = 256;
/// One entry of a logit bias.
const BIAS_BYTES: usize = 10;

/// Most bytes of a plan that opens nobody.
pub(super) fn base_bytes(engine: &Engine) -> usize {
    let blocks = engine.step_tokens / engine.block_tokens + engine.max_running;
    HEAD_BYTES + WORK_BYTES * engine.max_running + BLOCK_BYTES * blocks
}

/// Most bytes of a newcomer with `tokens` tokens.
pub(super) fn open_bytes(engine: &Engine, sequence: &Sequence, tokens: usize) -> usize {
    let new = &sequence.new;
    OPEN_BYTES
        + tokens * varint_bytes(engine.vocab)
        + tokens.div_ceil(engine.block_tokens) * BLOCK_BYTES
        + new.media.len() * MEDIA_BYTES
        + new.sampling.logit_bias.len() * BIAS_BYTES
}

/// Bytes of the largest number below `vocab` in postcard: seven bits each.
fn varint_bytes(vocab: u32) -> usize {
    (u32::BITS - vocab.saturating_sub(1).leading_zeros()).div_ceil(7).max(1) as usize
}

impl Planner {
    /// Why a sequence can never be told to an executor.
    pub(super) fn too_large_to_send(&self, engine: &Engine, sequence: &Sequence) -> Option<JobError> {
        let longest = sequence.prompt_tokens + sequence.new.max_tokens as usize;
        let (needed, limit) = (base_bytes(engine) + open_bytes(engine, sequence, longest), self.limits.plan_bytes);
        (needed > limit).then(|| {
            let message = format!(
                "{longest} tokens may need a plan of {needed} bytes, the NATS server takes {limit}; \
                 ask for fewer tokens, or raise its max_payload"
            );
            JobError::new(ErrorCode::TooLarge, message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_weigh_what_postcard_gives_the_largest() {
        for vocab in [1, 2, 127, 128, 129, 16_384, 16_385, 151_936, 1 << 21, (1 << 21) + 1, u32::MAX] {
            let bytes = postcard::to_stdvec(&(vocab - 1)).unwrap().len();
            assert_eq!(varint_bytes(vocab), bytes, "{vocab}");
        }
    }
}
