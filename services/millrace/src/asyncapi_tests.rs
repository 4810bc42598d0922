//! The document agrees with the types, holds together, and the committed copy is fresh.

use std::collections::BTreeSet;
use std::path::Path;

use super::*;

#[test]
fn the_committed_copy_is_fresh() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/asyncapi.json");
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(committed == document_text().unwrap(), "run: cargo run -p millrace -- asyncapi > docs/asyncapi.json");
}

#[test]
fn every_reference_leads_somewhere() {
    let document = document().unwrap();
    let mut references = BTreeSet::new();
    collect_references(&document, &mut references);
    assert!(references.len() > 15, "{references:?}");
    for reference in references {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
}

fn collect_references(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get("$ref") {
                into.insert(reference.clone());
            }
            map.values().for_each(|inner| collect_references(inner, into));
        }
        Value::Array(items) => items.iter().for_each(|inner| collect_references(inner, into)),
        _ => {}
    }
}

#[test]
fn addresses_follow_the_grammar() {
    let document = document().unwrap();
    let address = |channel: &str| document["channels"][channel]["address"].as_str().unwrap().to_string();
    assert_eq!(address("jobs"), "millrace.v1.jobs.{class}.{model}.{job}");
    assert_eq!(address("out"), "millrace.v1.out.{job}");
    assert_eq!(address("cancel"), "millrace.v1.cancel.{job}");
    assert_eq!(address("deadLetters"), "millrace.v1.dlq.{label}.{job}");
    for (name, channel) in document["channels"].as_object().unwrap() {
        let parameters: BTreeSet<&str> =
            channel["parameters"].as_object().unwrap().keys().map(String::as_str).collect();
        let address = channel["address"].as_str().unwrap();
        let named: BTreeSet<&str> =
            address.split('.').filter_map(|token| token.strip_prefix('{')?.strip_suffix('}')).collect();
        assert_eq!(parameters, named, "{name}");
    }
}

#[test]
fn the_example_is_a_job() {
    let document = document().unwrap();
    let example = document["components"]["messages"]["job"]["examples"][0]["payload"].clone();
    let job: JobRequest = serde_json::from_value(example.clone()).unwrap();
    assert_eq!(serde_json::to_value(job).unwrap(), example);
}
