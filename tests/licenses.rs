//! Every dependency has a licence that may ship under Apache-2.0, and no crate stands twice without a reason.
//! Reads `cargo metadata` (an offline, instant check; tests/licenses.toml holds the lists).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.

use std::collections::{BTreeMap, BTreeSet};

use millrace_tests::workspace::{metadata, root};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lists {
    allow: Vec<String>,
    /// Crate -> who brings the second version.
    duplicates: BTreeMap<String, String>,
}

fn lists() -> Lists {
    toml::from_str(&std::fs::read_to_string(root().join("tests/licenses.toml")).unwrap()).unwrap()
}

/// An SPDX expression holds if, read left to right, every AND side and one OR side is allowed.
fn allowed(expression: &str, allow: &BTreeSet<&str>) -> bool {
    let flat = expression.replace(['(', ')'], " ").replace('/', " OR ");
    flat.split(" AND ").all(|side| side.split(" OR ").any(|license| allow.contains(license.trim())))
}

#[test]
fn licences_are_allowed() {
    let lists = lists();
    let allow: BTreeSet<&str> = lists.allow.iter().map(String::as_str).collect();
    let metadata = metadata(false).unwrap();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let license = package["license"].as_str().unwrap_or("none");
        if !allowed(license, &allow) {
            wrong.push(format!("{} {}: {license}", package["name"], package["version"]));
        }
    }
    assert!(wrong.is_empty(), "licences not in tests/licenses.toml:\n{}", wrong.join("\n"));
}

#[test]
fn no_crate_stands_twice_without_a_reason() {
    let lists = lists();
    let metadata = metadata(false).unwrap();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for node in metadata["packages"].as_array().unwrap() {
        versions.entry(node["name"].as_str().unwrap()).or_default().insert(node["version"].as_str().unwrap());
    }
    let twice: BTreeMap<&str, String> = versions
        .into_iter()
        .filter(|(_, versions)| versions.len() > 1)
        .map(|(name, versions)| (name, versions.into_iter().collect::<Vec<_>>().join(", ")))
        .collect();
    let unexplained: Vec<_> = twice.iter().filter(|(name, _)| !lists.duplicates.contains_key(**name)).collect();
    assert!(unexplained.is_empty(), "stand twice, without a reason in tests/licenses.toml: {unexplained:?}");
    let stale: Vec<_> = lists.duplicates.keys().filter(|name| !twice.contains_key(name.as_str())).collect();
    assert!(stale.is_empty(), "listed in tests/licenses.toml but no longer there twice: {stale:?}");
}

#[test]
fn expressions_are_read_as_spdx() {
    let allow = BTreeSet::from(["MIT", "Apache-2.0"]);
    assert!(allowed("MIT OR GPL-3.0", &allow));
    assert!(allowed("MIT/GPL-3.0", &allow));
    assert!(!allowed("MIT AND GPL-3.0", &allow));
    assert!(!allowed("none", &allow));
}
