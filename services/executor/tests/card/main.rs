//! The models on a CUDA device against transformers: the golden fixtures in bf16, with and without recorded steps, one by one
//! and side by side. Skips, and says so, without a device. Needs the fixtures' files only (`fixture::fixtures`).

// `cfg(test)` is always on here; it tells clippy that panics are how these files fail.
#[cfg(test)]
#[path = "../golden/fixture.rs"]
#[allow(dead_code)] // Parts of it serve the CPU's tests alone.
mod fixture;
#[cfg(test)]
mod golden;
#[cfg(test)]
#[path = "../golden/share.rs"]
mod share;
