//! The invariants of ARCHITECTURE.md that a test can hold: dependency edges, where `unsafe` and the environment may
//! appear, file sizes, module docs. A failure names the file and the rule.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use millrace_tests::workspace::{files, metadata, root};

/// Longest file, in lines.
const MAX_LINES: usize = 500;

fn sources() -> Vec<(PathBuf, String)> {
    let rust = files(&root(), ".rs").unwrap();
    rust.into_iter().map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap())).collect()
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// Code without line comments, string contents left alone: enough to look for keywords.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line.split("//").next().unwrap_or("")))
}

fn is_test_code(path: &str) -> bool {
    path.starts_with("tests/") || path.contains("/tests/") || path.contains("/benches/") || path.ends_with("tests.rs")
}

fn direct_dependencies() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let metadata = metadata(true)?;
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    Ok(packages
        .iter()
        .map(|package| {
            let normal = package["dependencies"].as_array().cloned().unwrap_or_default();
            let names =
                normal.iter().filter(|d| d["kind"].is_null()).filter_map(|d| d["name"].as_str().map(str::to_owned));
            (package["name"].as_str().unwrap_or_default().to_owned(), names.collect())
        })
        .collect())
}

#[test]
fn dependency_edges_are_the_documented_ones() {
    let edges = direct_dependencies().unwrap();
    let users = |name: &str| -> Vec<&str> {
        edges.iter().filter(|(_, deps)| deps.contains(name)).map(|(package, _)| package.as_str()).collect()
    };
    assert_eq!(users("async-nats"), ["millrace-bus"]);
    assert_eq!(users("millrace-kernels"), ["millrace-executor"]);
    assert_eq!(users("candle-core"), ["millrace-executor", "millrace-kernels"]);
    let protocol: Vec<&str> = edges["millrace-protocol"].iter().map(String::as_str).collect();
    assert_eq!(protocol, ["blake3", "postcard", "schemars", "serde", "serde_json", "thiserror"]);
    let no_models = ["millrace-executor", "millrace-preprocess", "millrace-scheduler"];
    for package in ["millrace-bus", "millrace-runtime", "millrace-pager", "millrace-config", "millrace-telemetry"] {
        for actor in no_models {
            assert!(!edges[package].contains(actor), "{package} depends on {actor}");
        }
    }
    for (actor, deps) in edges.iter().filter(|(name, _)| no_models.contains(&name.as_str())) {
        for other in no_models.iter().filter(|other| *other != actor) {
            assert!(!deps.contains(*other), "{actor} depends on {other}: actors meet on NATS only");
        }
    }
}

#[test]
fn unsafe_stands_in_kernels_only_and_says_why() {
    for (path, text) in sources() {
        let name = shown(&path);
        // This file holds the word as what it looks for.
        if name == "tests/tidy.rs" {
            continue;
        }
        let lines: Vec<&str> = text.lines().collect();
        for (number, code) in code_lines(&text) {
            let words: Vec<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            if !words.contains(&"unsafe") {
                continue;
            }
            assert!(name.starts_with("kernels/"), "{name}:{number}: `unsafe` outside kernels");
            let is_block = code.contains("unsafe {") || code.contains("unsafe impl");
            let near = lines[number.saturating_sub(6)..number].join("\n");
            assert!(!is_block || near.contains("SAFETY"), "{name}:{number}: no SAFETY line");
        }
    }
}

#[test]
fn only_config_reads_the_environment() {
    for (path, text) in sources() {
        let name = shown(&path);
        if name.starts_with("services/config/") || name.ends_with("build.rs") || is_test_code(&name) {
            continue;
        }
        for (number, code) in code_lines(&text) {
            assert!(!code.contains("env::var"), "{name}:{number}: reads the environment; take the value from config");
        }
    }
}

#[test]
fn time_is_read_in_one_place() {
    for (path, text) in sources() {
        let name = shown(&path);
        if name == "services/runtime/src/clock.rs" || is_test_code(&name) {
            continue;
        }
        let tests_from = text.find("#[cfg(test)]").unwrap_or(text.len());
        for (number, code) in code_lines(&text[..tests_from]) {
            let reads = code.contains("Instant::now") || code.contains("SystemTime::now");
            assert!(!reads, "{name}:{number}: reads a clock; take runtime::Clock");
        }
    }
}

#[test]
fn files_are_small_and_say_what_they_own() {
    for (path, text) in sources() {
        let name = shown(&path);
        let lines = text.lines().count();
        assert!(lines <= MAX_LINES, "{name}: {lines} lines, more than {MAX_LINES}");
        assert!(text.starts_with("//!"), "{name}: does not start with a `//!` that says what it owns");
    }
}

#[test]
fn nothing_is_left_unfinished_or_switched_off() {
    let this = shown(&root().join("tests/tidy.rs"));
    for (path, text) in sources() {
        let name = shown(&path);
        if name == this {
            continue;
        }
        for (number, line) in text.lines().enumerate().map(|(i, line)| (i + 1, line)) {
            // What is looked for, not unfinished work.
            for word in ["todo!(", "unimplemented!(", "FIXME", "#[ignore"] {
                assert!(!line.contains(word), "{name}:{number}: {word}");
            }
            let waits = line.contains("thread::sleep") || line.contains("time::sleep(");
            assert!(!(waits && is_test_code(&name)), "{name}:{number}: a test waits for time instead of an event");
        }
    }
}

#[test]
fn the_top_level_is_the_agreed_one() {
    let agreed = ["deploy", "docs", "kernels", "services", "target", "tests"];
    for entry in std::fs::read_dir(root()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_folder = entry.file_type().unwrap().is_dir();
        assert!(!is_folder || name.starts_with('.') || agreed.contains(&name.as_str()), "unexpected folder {name}");
    }
}
