//! docs/errors.md against the code: every code and label has its row, every row its code, and no cell is empty.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // In tests a panic is the failure.

use std::collections::{BTreeMap, BTreeSet};

use millrace_executor::ExecutorError;
use millrace_preprocess::LoadError;
use millrace_protocol::ErrorCode;
use millrace_tests::workspace::root;

/// Rows of the tables below `heading`, by the name in their first cell.
fn rows(heading: &str) -> BTreeMap<String, Vec<String>> {
    let text = std::fs::read_to_string(root().join("docs/errors.md")).unwrap();
    let section = text.split("\n## ").find(|section| section.starts_with(heading)).expect("a heading");
    let mut rows = BTreeMap::new();
    for line in section.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<String> = line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
        assert!(cells.iter().all(|cell| cell.len() > 1), "an empty cell in {line}");
        let name = cells[0].trim_matches('`').to_owned();
        assert!(rows.insert(name, cells).is_none(), "{line} stands twice");
    }
    rows
}

#[test]
fn every_code_of_a_job_is_documented() {
    let rows = rows("Faults of a job");
    let documented: BTreeSet<&str> = rows.keys().map(String::as_str).collect();
    assert_eq!(documented, ErrorCode::ALL.iter().map(|code| code.as_str()).collect());
    for code in ErrorCode::ALL {
        let cells = &rows[code.as_str()];
        assert_eq!((cells.len(), &cells[1]), (4, &code.number().to_string()), "{cells:?}");
    }
}

#[test]
fn every_label_of_a_checkpoint_is_documented() {
    let rows = rows("Faults of a checkpoint");
    let documented: BTreeSet<&str> = rows.keys().map(String::as_str).collect();
    assert_eq!(documented, ExecutorError::LABELS.iter().chain(LoadError::LABELS).copied().collect());
    assert!(rows.values().all(|cells| cells.len() == 3));
}
