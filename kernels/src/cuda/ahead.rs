//! Which weights a linear of few rows asks into the L2 while it ends: those of the linear after the next one, of which no block runs
//! yet. (The next one's blocks wait already and ask for their own.) The order is known once a step has run: the run before its
//! recording writes it down. Must not change any result.

use std::sync::{Mutex, PoisonError};

/// How far ahead: 1 is the next linear.
const DISTANCE: usize = 2;
/// Bytes of it: about what the memory could have given while the device went from one linear to the next (found by search, H200,
/// 2026-11-26: less and more are slower).
const BYTES: usize = 3 << 20;

/// An address and how many bytes from there.
pub(super) type Range = (u64, usize);

/// The linears of a step in order.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    /// No step is being recorded.
    #[default]
    Off,
    /// The step runs once: its weights so far.
    Listing(Vec<Range>),
    /// It runs again, to be recorded: its weights, and how many have been used.
    Following(Vec<Range>, usize),
}

impl Ahead {
    fn set(&self, next: impl FnOnce(State) -> State) {
        let state = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = next(std::mem::take(state));
    }

    /// A step begins that will be recorded after it.
    pub fn list(&self) {
        self.set(|_| State::Listing(Vec::new()));
    }

    /// The same step begins again, being recorded.
    pub fn follow(&self) {
        self.set(|state| match state {
            State::Listing(weights) => State::Following(weights, 0),
            _ => State::Off,
        });
    }

    /// The recording has ended.
    pub fn end(&self) {
        self.set(|_| State::Off);
    }

    /// What the linear of `weight` should ask for; nothing outside of a recording. A step's last linears look at the first ones:
    /// the next step is mostly the same one.
    pub fn behind(&self, weight: Range) -> Range {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *state {
            State::Off => (0, 0),
            State::Listing(weights) => {
                weights.push(weight);
                (0, 0)
            }
            State::Following(weights, used) => {
                *used += 1;
                let (address, bytes) =
                    weights.get((*used - 1 + DISTANCE) % weights.len().max(1)).copied().unwrap_or_default();
                (address, bytes.min(BYTES) / 16 * 16)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_looks_past_the_next_weight_and_around_the_end() {
        let ahead = Ahead::default();
        let weights = [(1 << 20, 64), (2 << 20, 1 << 30), (3 << 20, 40), (4 << 20, 128)];
        assert_eq!(ahead.behind(weights[0]), (0, 0), "nothing is recorded");
        ahead.list();
        assert!(weights.iter().all(|weight| ahead.behind(*weight) == (0, 0)));
        ahead.follow();
        let asked: Vec<Range> = weights.iter().map(|weight| ahead.behind(*weight)).collect();
        assert_eq!(asked, [(3 << 20, 32), (4 << 20, 128), (1 << 20, 64), (2 << 20, BYTES)]);
        ahead.end();
        assert_eq!(ahead.behind(weights[0]), (0, 0));
        ahead.follow();
        assert_eq!(ahead.behind(weights[0]), (0, 0), "nothing was listed");
        ahead.list();
        ahead.follow();
        assert_eq!(ahead.behind(weights[0]), (0, 0), "a step without linears of few rows");
    }
}
