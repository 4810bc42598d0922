//! Content keys of KV blocks, as they stand in beacons too: owned by `protocol`, since routing computes the same keys.

pub use millrace_protocol::prefix::{BlockHash, HashChain};
