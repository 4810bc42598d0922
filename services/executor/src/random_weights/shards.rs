//! Writes tensors as they come into safetensors files of bounded size, and their index if there are several.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{Tensor, safetensors};
use serde_json::json;

use super::RandomSummary;
use crate::error::ExecutorError;

/// A file is closed when its tensors reach this many bytes.
const SHARD_BYTES: u64 = 2 << 30;

/// Tensors not yet written and what was.
pub(super) struct Shards {
    dir: PathBuf,
    open: HashMap<String, Tensor>,
    open_bytes: u64,
    /// Shard of each tensor written.
    written: BTreeMap<String, usize>,
    shards: usize,
    parameters: u64,
    bytes: u64,
}

impl Shards {
    pub(super) fn new(dir: &std::path::Path) -> Self {
        let (open, written) = (HashMap::new(), BTreeMap::new());
        Self { dir: dir.into(), open, open_bytes: 0, written, shards: 0, parameters: 0, bytes: 0 }
    }

    pub(super) fn push(&mut self, name: &str, tensor: Tensor) -> Result<(), ExecutorError> {
        let count = tensor.elem_count() as u64;
        let bytes = count * tensor.dtype().size_in_bytes() as u64;
        self.parameters += count;
        self.bytes += bytes;
        self.open_bytes += bytes;
        self.open.insert(name.into(), tensor);
        if self.open_bytes >= SHARD_BYTES { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), ExecutorError> {
        self.shards += 1;
        let path = self.dir.join(unnumbered(self.shards));
        safetensors::save(&self.open, &path).map_err(ExecutorError::candle)?;
        self.written.extend(self.open.drain().map(|(name, _)| (name, self.shards)));
        self.open_bytes = 0;
        Ok(())
    }

    /// Writes the rest, gives the files their official names, and writes the index if there are several.
    pub(super) fn finish(mut self) -> Result<RandomSummary, ExecutorError> {
        if !self.open.is_empty() {
            self.close()?;
        }
        let count = self.shards;
        let name = |shard: usize| match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{shard:05}-of-{count:05}.safetensors"),
        };
        for shard in 1..=count {
            let path = self.dir.join(unnumbered(shard));
            let renamed = std::fs::rename(&path, self.dir.join(name(shard)));
            renamed.map_err(|source| ExecutorError::Io { path, source })?;
        }
        if count > 1 {
            let map: BTreeMap<&String, String> = self.written.iter().map(|(key, shard)| (key, name(*shard))).collect();
            let index = json!({"metadata": {"total_size": self.bytes}, "weight_map": map});
            let path = self.dir.join("model.safetensors.index.json");
            let text = format!("{index:#}\n");
            std::fs::write(&path, text).map_err(|source| ExecutorError::Io { path, source })?;
        }
        Ok(RandomSummary { tensors: self.written.len(), parameters: self.parameters, bytes: self.bytes })
    }
}

/// A shard's name until their number is known.
fn unnumbered(shard: usize) -> String {
    format!("model-{shard:05}.partial")
}
