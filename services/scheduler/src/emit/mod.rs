//! From drawn tokens to the text a subscriber sees: detokenising, stop texts, deltas. Synchronous; must not do I/O
//! beyond reading the tokenizer once.

pub mod detokenizer;
pub mod emitter;
pub mod stop;

pub use detokenizer::{Detokenizer, Vocabulary};
pub use emitter::{Delta, Emitter};

#[cfg(test)]
mod tests;
