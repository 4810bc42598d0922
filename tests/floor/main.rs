//! The floor: what every model has to have, driven on each and printed as a table of model and item. An item that a model lacks
//! fails the test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.

mod items;
mod recorder;
mod seeing;
mod stand;

use std::collections::BTreeSet;

use anyhow::Result;
use millrace_tests::workspace::{files, root};
use stand::Stand;

/// Model files of the registry.
const MODELS: [&str; 4] = ["qwen3", "qwen3_moe", "glm4_moe_lite", "qwen3_vl"];

type Item = (&'static str, fn(&Stand) -> Result<String>);

const ITEMS: [Item; 6] = [
    ("paged KV, block tables", items::paged),
    ("continuous batching", items::continuous),
    ("chunks + decodes, one ragged step", items::ragged),
    ("cached cos/sin tables", items::rope_tables),
    ("fused norms", items::fused_norms),
    ("fused SwiGLU", items::fused_swiglu),
];

const SEEING: [Item; 2] =
    [("tensor paging, RAM and disk", seeing::paging), ("fused resize + normalise", |_| seeing::fused_resize())];

#[test]
fn the_table_has_every_model_file() {
    let folder = root().join("services/executor/src/models");
    let names = files(&folder, ".rs").unwrap().into_iter().map(|path| path.file_stem().unwrap().display().to_string());
    let models: BTreeSet<String> = names.filter(|name| !["mod", "text"].contains(&name.as_str())).collect();
    assert_eq!(models, MODELS.map(String::from).into());
}

#[test]
fn every_model_has_every_item() {
    let stands: Vec<Stand> = MODELS.iter().map(|name| Stand::new(name).unwrap()).collect();
    let mut lacking = Vec::new();
    println!("{:34}{}", "", MODELS.map(|name| format!("{name:20}")).concat());
    for (item, drive) in ITEMS.iter().chain(&SEEING) {
        let seeing = SEEING.iter().any(|(name, _)| name == item);
        let mut row = format!("{item:34}");
        for stand in &stands {
            let cell = match (!seeing || stand.sees).then(|| drive(stand)) {
                None => "-".to_owned(),
                Some(Ok(seen)) => seen,
                Some(Err(why)) => {
                    lacking.push(format!("{} lacks {item}: {why:#}", stand.name));
                    "LACKING".to_owned()
                }
            };
            row.push_str(&format!("{cell:20}"));
        }
        println!("{}", row.trim_end());
    }
    assert!(lacking.is_empty(), "{}", lacking.join("\n"));
}
