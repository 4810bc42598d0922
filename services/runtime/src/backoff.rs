//! Exponential back-off with jitter: how long to wait before the next try. Must not wait itself.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// How waits grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackoffPolicy {
    /// Wait before the first new try.
    pub first: Duration,
    /// Longest wait.
    pub longest: Duration,
    /// A run of at least this length counts as healthy: the waits start over.
    pub healthy_after: Duration,
}

impl Default for BackoffPolicy {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(100),
            longest: Duration::from_secs(10),
            healthy_after: Duration::from_secs(30),
        }
    }
}

/// Successive waits: each is drawn evenly from the upper half of `first * 2^n`, capped, so that peers which failed
/// together do not come back together.
#[derive(Debug, Clone)]
pub struct Backoff {
    policy: BackoffPolicy,
    tries: u32,
    random: u64,
}

impl Backoff {
    /// Waits that differ from process to process.
    pub fn new(policy: BackoffPolicy) -> Self {
        Self::with_seed(policy, RandomState::new().build_hasher().finish())
    }

    /// Waits that repeat for the same seed.
    pub fn with_seed(policy: BackoffPolicy, seed: u64) -> Self {
        Self { policy, tries: 0, random: seed }
    }

    /// The next wait: longer on average each time.
    pub fn next_delay(&mut self) -> Duration {
        let doubled = self.policy.first.saturating_mul(2_u32.saturating_pow(self.tries.min(31)));
        self.tries = self.tries.saturating_add(1);
        let ceiling = doubled.min(self.policy.longest);
        ceiling.mul_f64(0.5 + 0.5 * self.fraction())
    }

    /// One wait for a caller that counts its tries itself (0 or 1 for the first).
    pub fn delay_after(policy: BackoffPolicy, tries: usize) -> Duration {
        let mut backoff = Self::new(policy);
        backoff.tries = u32::try_from(tries.saturating_sub(1)).unwrap_or(u32::MAX);
        backoff.next_delay()
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.tries = 0;
    }

    /// Waits handed out since the last reset.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// Even in [0, 1): SplitMix64 (Steele, Lea, Flood 2014), top 53 bits.
    fn fraction(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        #[allow(clippy::cast_precision_loss)] // 53 bits fit an f64 exactly.
        let fraction = (z >> 11) as f64 / (1_u64 << 53) as f64;
        fraction
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: BackoffPolicy = BackoffPolicy {
        first: Duration::from_millis(100),
        longest: Duration::from_millis(1_000),
        healthy_after: Duration::from_secs(1),
    };

    proptest! {
        #[test]
        fn every_wait_lies_in_the_upper_half_of_its_step(seed: u64, tries in 1_usize..80) {
            let mut backoff = Backoff::with_seed(POLICY, seed);
            for n in 0..tries {
                let ceiling = Duration::from_millis(100_u64.saturating_mul(1 << n.min(20)).min(1_000));
                let wait = backoff.next_delay();
                prop_assert!(wait >= ceiling / 2 && wait <= ceiling, "{wait:?} of {ceiling:?}");
            }
        }
    }

    #[test]
    fn seeds_differ_and_reset_starts_over() {
        let mut one = Backoff::with_seed(POLICY, 1);
        let mut two = Backoff::with_seed(POLICY, 2);
        assert_ne!(one.next_delay(), two.next_delay());
        for _ in 0..10 {
            one.next_delay();
        }
        one.reset();
        assert!(one.next_delay() <= POLICY.first);
        assert_eq!(one.tries(), 1);
    }
}
