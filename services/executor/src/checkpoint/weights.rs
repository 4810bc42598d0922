//! Tensors of a checkpoint by name, out of one safetensors file or several with an index. Every tensor is taken at most
//! once, with its shape checked; what nobody took is an error at the end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use millrace_kernels::mapped_tensor;
use safetensors::tensor::{Dtype, TensorInfo};

use super::file::WeightFile;
use super::{Pieces, TensorSource};
use crate::error::ExecutorError;

/// The one file of a small checkpoint.
const SINGLE: &str = "model.safetensors";
/// The list of shards of a large one.
const INDEX: &str = "model.safetensors.index.json";
/// Names shown in an error about unused tensors.
const NAMES_SHOWN: usize = 8;

#[derive(Debug)]
struct Entry {
    file: usize,
    info: TensorInfo,
}

/// All tensors that were not taken yet.
#[derive(Debug)]
pub struct Weights {
    files: Vec<WeightFile>,
    entries: BTreeMap<String, Entry>,
}

impl Weights {
    /// Opens the weights of `dir`.
    ///
    /// # Errors
    /// No weights, a file that is cut short or whose header is broken, an index that does not match its shards.
    pub fn open(dir: &Path) -> Result<Self, ExecutorError> {
        let single = dir.join(SINGLE);
        let index_path = dir.join(INDEX);
        let index = if single.exists() { None } else { Some(read_index(&index_path)?) };
        let names: BTreeSet<&str> =
            index.as_ref().map_or_else(|| BTreeSet::from([SINGLE]), |map| map.values().map(String::as_str).collect());
        let mut weights = Self { files: Vec::new(), entries: BTreeMap::new() };
        for name in names {
            weights.add_file(dir.join(name))?;
        }
        if let Some(index) = index {
            weights.check_index(&index_path, &index)?;
        }
        Ok(weights)
    }

    fn add_file(&mut self, path: PathBuf) -> Result<(), ExecutorError> {
        let (file, metadata) = WeightFile::open(path)?;
        for (name, info) in metadata.tensors() {
            let entry = Entry { file: self.files.len(), info: info.clone() };
            if self.entries.insert(name.clone(), entry).is_some() {
                let what = format!("tensor `{name}` is also in another file");
                return Err(ExecutorError::Malformed { path: file.path().into(), what });
            }
        }
        self.files.push(file);
        Ok(())
    }

    fn check_index(&self, path: &Path, index: &HashMap<String, String>) -> Result<(), ExecutorError> {
        let malformed = |what: String| ExecutorError::Malformed { path: path.to_path_buf(), what };
        for (name, file) in index {
            let found = self.entries.get(name).and_then(|entry| self.files.get(entry.file));
            if !found.is_some_and(|found| found.path().ends_with(file)) {
                return Err(malformed(format!("tensor `{name}` is not in {file}")));
            }
        }
        match self.entries.keys().find(|name| !index.contains_key(*name)) {
            Some(name) => Err(malformed(format!("tensor `{name}` is in a shard but not in the index"))),
            None => Ok(()),
        }
    }

    /// Ends loading.
    ///
    /// # Errors
    /// [`ExecutorError::UnusedTensors`] names what was not taken.
    pub fn finish(self) -> Result<(), ExecutorError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let names = self.entries.keys().take(NAMES_SHOWN).cloned().collect();
        Err(ExecutorError::UnusedTensors { count: self.entries.len(), names })
    }

    /// Elements of all tensors that were not taken yet; a size that overflows counts as the largest number.
    pub(super) fn elements(&self) -> u64 {
        let count =
            |entry: &Entry| entry.info.shape.iter().fold(1u64, |product, size| product.saturating_mul(*size as u64));
        self.entries.values().map(count).fold(0, u64::saturating_add)
    }

    /// One line for each tensor: name, dtype, shape.
    pub(super) fn listing(&self) -> impl Iterator<Item = String> + '_ {
        self.entries.iter().map(|(name, entry)| format!("{name} {:?} {:?}", entry.info.dtype, entry.info.shape))
    }

    /// Marks a tensor of exactly `shape` as taken; the file that holds it.
    fn remove(&mut self, name: &str, shape: &[usize]) -> Result<(usize, TensorInfo), ExecutorError> {
        let Entry { file, info } =
            self.entries.remove(name).ok_or_else(|| ExecutorError::MissingTensor(name.into()))?;
        if info.shape != shape {
            let (found, expected) = (info.shape, shape.to_vec());
            return Err(ExecutorError::TensorShape { name: name.into(), found, expected });
        }
        Ok((file, info))
    }

    /// Marks tensors of one dtype as taken; where they lie.
    fn pieces(&mut self, wanted: &[(String, Vec<usize>)]) -> Result<Pieces<'_>, ExecutorError> {
        let mut taken = Vec::with_capacity(wanted.len());
        for (name, shape) in wanted {
            taken.push((name, self.remove(name, shape)?));
        }
        let (mut parts, mut common) = (Vec::with_capacity(wanted.len()), None);
        for (name, (file, info)) in &taken {
            let dtype = dtype(name, info)?;
            if *common.get_or_insert(dtype) != dtype {
                return Err(ExecutorError::Unsupported(format!(
                    "tensor `{name}` is {dtype:?}, those it joins are not"
                )));
            }
            let missing = || ExecutorError::MissingTensor((*name).clone());
            let (start, end) = info.data_offsets;
            parts.push(self.files.get(*file).ok_or_else(missing)?.data(start, end)?);
        }
        Ok(Pieces { parts, dtype: common.unwrap_or(DType::F32) })
    }

    /// The files, in order of their names.
    pub(super) fn files(&self) -> &[WeightFile] {
        &self.files
    }
}

impl TensorSource for Weights {
    fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, ExecutorError> {
        let Pieces { parts, dtype } = self.pieces(&[(name.to_owned(), shape.to_vec())])?;
        Ok(mapped_tensor(&parts, dtype, shape)?)
    }

    fn take_pieces(&mut self, parts: &[(String, Vec<usize>)]) -> Result<Option<Pieces<'_>>, ExecutorError> {
        self.pieces(parts).map(Some)
    }

    fn leave_out(&mut self, prefix: &str) -> usize {
        let before = self.entries.len();
        self.entries.retain(|name, _| !name.starts_with(prefix));
        before - self.entries.len()
    }
}

fn dtype(name: &str, info: &TensorInfo) -> Result<DType, ExecutorError> {
    match info.dtype {
        Dtype::BF16 => Ok(DType::BF16),
        Dtype::F16 => Ok(DType::F16),
        Dtype::F32 => Ok(DType::F32),
        other => Err(ExecutorError::Unsupported(format!("tensor `{name}` has dtype {other:?}"))),
    }
}

fn read_index(path: &Path) -> Result<HashMap<String, String>, ExecutorError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let text = std::fs::read(path).map_err(|source| ExecutorError::Io { path: path.into(), source })?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|error| ExecutorError::Malformed { path: path.into(), what: error.to_string() })?;
    Ok(index.weight_map)
}
