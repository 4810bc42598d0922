//! `--model`: a folder, or a Hugging Face repository that is fetched into the ordinary cache. Owns which files are
//! needed and what to say when the hub does not answer; hf-hub owns the transfer and the cache's layout.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Context;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;
use millrace_protocol::ModelName;

use crate::exit::{unavailable, usage};

/// One `--model` as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelArg {
    /// Where it is.
    pub place: ModelPlace,
    /// Name under which it is served.
    pub name: ModelName,
}

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelPlace {
    /// A folder in Hugging Face's layout.
    Folder(PathBuf),
    /// A repository on the hub.
    Repository {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit.
        revision: String,
    },
}

impl ModelArg {
    /// Reads `DIR[=NAME]` or `OWNER/REPO[@REVISION][=NAME]`. What exists as a folder is one.
    ///
    /// # Errors
    /// A usage fault if it is neither, or the name is no subject token.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let (place, name) = match text.rsplit_once('=') {
            Some((place, name)) => (place, Some(name)),
            None => (text, None),
        };
        let bad_name = |error| usage(format!("--model {text}: {error}"));
        let name = name.map(|name| ModelName::new(name).map_err(bad_name)).transpose()?;
        if Path::new(place).is_dir() {
            let folder = std::fs::canonicalize(place).with_context(|| format!("--model {text}"))?;
            let last = folder.file_name().map(|last| last.to_string_lossy().into_owned()).unwrap_or_default();
            let name = name.map_or_else(|| ModelName::from_text(&last).map_err(bad_name), Ok)?;
            return Ok(Self { place: ModelPlace::Folder(folder), name });
        }
        let (id, revision) = place.split_once('@').unwrap_or((place, "main"));
        if !is_repository_id(id) || revision.is_empty() {
            return Err(usage(format!(
                "--model {text}: neither a folder nor a repository id; give a folder with config.json or OWNER/REPO[@REVISION]"
            )));
        }
        let last = id.rsplit('/').next().unwrap_or(id);
        let name = name.map_or_else(|| ModelName::from_text(last).map_err(bad_name), Ok)?;
        Ok(Self { place: ModelPlace::Repository { id: id.to_string(), revision: revision.to_string() }, name })
    }
}

fn is_repository_id(text: &str) -> bool {
    let word = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    text.split_once('/').is_some_and(|(owner, name)| word(owner) && word(name))
}

/// How the hub is reached. The default leaves it to hf-hub: `HF_HOME`, `HF_ENDPOINT` and the stored login.
#[derive(Debug, Clone, Default)]
pub struct Hub {
    /// The cache folder that holds `models--OWNER--REPO`; `None` is `$HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache: Option<PathBuf>,
    /// The hub's address; `None` is `$HF_ENDPOINT`, else `https://huggingface.co`.
    pub endpoint: Option<String>,
}

/// Fetches what a model needs of `id` at `revision` and returns its snapshot folder. Files already there are not
/// fetched again. If the hub does not answer but the cache holds the model, that is used, and standard error says so.
///
/// # Errors
/// A usage fault for an unknown or closed repository or one without weights, an unavailable one for the network.
pub fn fetch(id: &str, revision: &str, hub: &Hub) -> anyhow::Result<PathBuf> {
    let cache = hub.cache.clone().map_or_else(Cache::from_env, Cache::new);
    let mut builder = hub.cache.clone().map_or_else(ApiBuilder::from_env, |_| ApiBuilder::from_cache(cache.clone()));
    if let Some(endpoint) = &hub.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let api = builder.build().context("cannot set up the connection to the hub")?;
    let branch = Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
    let url = api.repo(branch.clone()).url("");
    let endpoint = url.split_once(&format!("/{id}/")).map_or(url.as_str(), |(endpoint, _)| endpoint).to_string();
    let snapshots = cache.path().join(branch.folder_name()).join("snapshots");

    let info = match api.repo(branch.clone()).info() {
        Ok(info) => info,
        Err(error) => {
            let fault = hub_fault(id, &endpoint, error);
            let Some(folder) = cached(&cache, &branch, &snapshots) else { return Err(fault) };
            eprintln!("warning: {fault:#}\nwarning: using the copy in {}", folder.display());
            return Ok(folder);
        }
    };
    // Pinned to the commit, so that a push to the branch in between cannot mix two versions in one folder.
    let pinned = api.repo(Repo::with_revision(id.to_string(), RepoType::Model, info.sha.clone()));
    let folder = snapshots.join(&info.sha);
    let listed: BTreeSet<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    let fault = |error| hub_fault(id, &endpoint, error);
    let mut shards = None;
    if listed.contains(INDEX) {
        get(&pinned, &folder, INDEX).map_err(fault)?;
        shards = Some(shards_of(&folder.join(INDEX))?);
    }
    let wanted = needed(&listed, shards.as_ref());
    if !wanted.iter().any(|file| file.ends_with(".safetensors")) {
        return Err(usage(format!("{id} has no .safetensors weights; choose a repository in Hugging Face's layout")));
    }
    for file in &wanted {
        get(&pinned, &folder, file).map_err(fault)?;
    }
    cache.repo(branch).create_ref(&info.sha).context("cannot write the cache's ref")?;
    Ok(folder)
}

const INDEX: &str = "model.safetensors.index.json";

/// The files of a repository that serving needs: no folders, no other formats, and of the weights only the shards
/// that the index names, if there is one.
fn needed(listed: &BTreeSet<String>, shards: Option<&BTreeSet<String>>) -> Vec<String> {
    let wanted = |name: &&String| {
        if name.contains('/') || name.starts_with('.') {
            return false;
        }
        match shards {
            Some(shards) if name.ends_with(".safetensors") => shards.contains(*name),
            _ => {
                let by_end = [".json", ".safetensors", ".jinja"].iter().any(|end| name.ends_with(end));
                by_end || matches!(name.as_str(), "merges.txt" | "vocab.txt")
            }
        }
    };
    // Small files first: a wrong architecture is then found before gigabytes of weights.
    let mut files: Vec<String> = listed.iter().filter(wanted).cloned().collect();
    files.sort_by_key(|name| (name.ends_with(".safetensors"), name.clone()));
    files
}

fn shards_of(index: &Path) -> anyhow::Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(index).with_context(|| format!("cannot read {}", index.display()))?;
    let index: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("{INDEX} is not JSON"))?;
    let map = index.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.with_context(|| format!("{INDEX} has no weight_map"))?;
    Ok(map.values().filter_map(|shard| shard.as_str().map(str::to_string)).collect())
}

fn get(repo: &ApiRepo, folder: &Path, file: &str) -> Result<(), ApiError> {
    if folder.join(file).exists() {
        return Ok(());
    }
    let bar = ProgressBar::new(0);
    if bar.is_hidden() {
        eprintln!("fetching {file}");
    }
    repo.download_with_progress(file, bar).map(|_| ())
}

/// The cache's own copy, as the last fetch of that branch left it, if it can be served.
fn cached(cache: &Cache, branch: &Repo, snapshots: &Path) -> Option<PathBuf> {
    let reference = cache.path().join(branch.folder_name()).join("refs").join(branch.revision());
    let commit = std::fs::read_to_string(reference).ok()?;
    let folder = snapshots.join(commit.trim());
    let names: BTreeSet<String> =
        std::fs::read_dir(&folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let shards = if names.contains(INDEX) { shards_of(&folder.join(INDEX)).ok()? } else { BTreeSet::new() };
    let whole = names.contains("config.json")
        && names.iter().any(|name| name.ends_with(".safetensors"))
        && shards.is_subset(&names);
    whole.then_some(folder)
}

fn hub_fault(id: &str, endpoint: &str, error: ApiError) -> anyhow::Error {
    let text = error.to_string();
    let status = match error {
        ApiError::RequestError(request) => (*request).into_response().map(|response| response.status()),
        _ => None,
    };
    match status {
        Some(401 | 403) => usage(format!(
            "{id}: the hub refuses it: no such repository, or one that needs a login; check the id, or run `hf auth login`"
        )),
        Some(404) => usage(format!("{id}: no such repository or revision at {endpoint}; check --model")),
        _ => unavailable(format!(
            "{id}: cannot be fetched from {endpoint}: {text}; check the network, or copy the folder here and give it as --model DIR"
        )),
    }
}

#[cfg(test)]
#[path = "model_source_tests.rs"]
mod tests;
