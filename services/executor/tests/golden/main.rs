//! The models against transformers: logits, greedy answers and positions of tiny random checkpoints (tests/golden/make.py),
//! and what must not change a result: how a step is cut, batched and paged.

// `cfg(test)` is always on here; it tells clippy that panics are how these files fail.
#[cfg(test)]
mod bf16;
#[cfg(test)]
mod broken;
#[cfg(test)]
mod bytes;
#[cfg(test)]
mod encoder_cache;
#[cfg(test)]
mod exact;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod invariance;
#[cfg(test)]
mod mutant_backend;
#[cfg(test)]
mod mutants;
#[cfg(test)]
mod official;
#[cfg(test)]
mod run_ahead;
#[cfg(test)]
mod share;
#[cfg(test)]
mod steps;
#[cfg(test)]
mod swap;
