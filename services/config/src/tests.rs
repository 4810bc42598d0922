//! The file in the repository, the defaults, the schema and the checks, against each other.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const REPOSITORY_FILE: &str = include_str!("../../../pipeline.toml");

fn none() -> Environment {
    Environment::default()
}

fn problems(text: &str) -> Vec<String> {
    match Config::parse(text, &none()) {
        Err(ConfigError::Invalid { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_repository_file_says_what_the_code_does() {
    assert_eq!(Config::parse(REPOSITORY_FILE, &none()).unwrap(), Config::default());
    assert_eq!(Config::parse("", &none()).unwrap(), Config::default());
    let raw: raw::Config = toml::from_str(REPOSITORY_FILE).unwrap();
    assert_eq!(raw, raw::Config::default());
}

/// Every key of a schema as `table.key`, following references and list items.
fn keys(schema: &serde_json::Value, root: &serde_json::Value, at: &str, found: &mut BTreeSet<String>) {
    let schema = match schema.get("$ref").and_then(|r| r.as_str()) {
        Some(reference) => root.pointer(reference.trim_start_matches('#')).expect(reference),
        None => schema,
    };
    if let Some(items) = schema.get("items") {
        return keys(items, root, at, found);
    }
    match schema.get("properties").and_then(|p| p.as_object()) {
        None => {
            found.insert(at.to_string());
        }
        Some(properties) => {
            for (name, property) in properties {
                keys(property, root, &format!("{at}.{name}"), found);
            }
        }
    }
}

/// Every key that a TOML document writes.
fn written(value: &toml::Value, at: &str, found: &mut BTreeSet<String>) {
    match value {
        toml::Value::Table(table) => {
            table.iter().for_each(|(name, value)| written(value, &format!("{at}.{name}"), found))
        }
        toml::Value::Array(list) if list.iter().any(toml::Value::is_table) => {
            list.iter().for_each(|value| written(value, at, found));
        }
        _ => {
            found.insert(at.to_string());
        }
    }
}

#[test]
fn the_repository_file_writes_every_key_of_the_schema() {
    let schema = serde_json::to_value(schemars::schema_for!(raw::Config)).unwrap();
    let (mut known, mut shown) = (BTreeSet::new(), BTreeSet::new());
    keys(&schema, &schema, "", &mut known);
    written(&toml::from_str(REPOSITORY_FILE).unwrap(), "", &mut shown);
    assert_eq!(known, shown);
    assert!(known.len() > 60, "{known:?}");
}

#[test]
fn unknown_keys_and_wrong_types_name_their_place() {
    for (text, named) in [
        ("[nats]\nurll = \"x\"", "urll"),
        ("[preprocess.limits]\nmax_image_pixel = 1", "max_image_pixel"),
        ("[[models]]\nnam = \"x\"", "nam"),
        ("[natss]", "natss"),
        ("[scheduler]\nstep_tokens = \"many\"", "step_tokens"),
        ("[scheduler]\nstep_tokens = -1", "step_tokens"),
        ("[scheduler", "line 1"),
    ] {
        let error = Config::parse(text, &none()).unwrap_err().to_string();
        assert!(error.contains(named), "{named} is not in: {error}");
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let found = problems(
        "[nats]\nurl = \"localhost\"\nprefix = \"a.b\"\n[streams]\nack_wait = \"fast\"\nmode = \"make\"\n\
         [scheduler]\nstep_tokens = 0\n[executor]\nslots = 0\ndevice = \"tpu\"\n[telemetry]\nlisten = \"everywhere\"",
    );
    let starts = [
        "[nats] url: must be \"auto\"",
        "[nats] prefix: `a.b` is not a name",
        "[streams] mode: must be \"create\" or \"verify\", not \"make\"",
        "[streams] ack_wait: `fast` is not a duration",
        "[scheduler] step_tokens: must be between 1 and",
        "[executor] device: must be \"auto\"",
        "[executor] slots: must be between 1 and",
        "[telemetry] listen: must be IP:PORT",
    ];
    for start in starts {
        assert!(found.iter().any(|problem| problem.starts_with(start)), "{start} is not in {found:#?}");
    }
}

#[test]
fn values_that_contradict_each_other_are_refused() {
    for (text, start) in [
        ("[nats]\nmax_payload = \"1MiB\"", "[streams] job_max_bytes: must leave"),
        ("[streams]\njobs_max_bytes = \"1MiB\"", "[streams] job_max_bytes: must not be larger"),
        ("[streams]\nmax_ack_pending = 31", "[streams] max_ack_pending: must be at least"),
        ("[streams]\nack_wait = \"31s\"", "[pager] lease: must not be shorter"),
        ("[scheduler]\nstep_tokens = 63", "[scheduler] max_sequences: must not exceed"),
        ("[executor]\nslots = 2049", "[executor] slots: must not exceed"),
        ("[executor]\nkv_bytes = \"1MiB\"\nblock_tokens = 1024", "[executor] kv_bytes: cannot hold"),
        (
            "[executor]\nkv_bytes = \"512MiB\"\n[scheduler]\nwatermark_blocks = 32768",
            "[scheduler] watermark_blocks: must be below the pool's blocks, 32768",
        ),
        (
            "[nats]\nmax_payload = \"128KiB\"\n[streams]\njob_max_bytes = \"64KiB\"\n\
             [scheduler]\nstep_tokens = 4096\nmax_sequences = 4096",
            "[scheduler] max_sequences: with step_tokens may need plans of",
        ),
        ("[[models]]\nname = \"a\"\n[[models]]\nname = \"a\"\ndefault = false", "[models] name: \"a\" is used twice"),
        ("[[models]]\nname = \"a\"\n[[models]]\nname = \"b\"", "[models] default: is true for more than one"),
        ("[preprocess]\nfile_roots = [\"media\"]", "[preprocess] file_roots: must hold absolute"),
    ] {
        let found = problems(text);
        assert!(found.len() == 1 && found[0].starts_with(start), "{start}: {found:#?}");
    }
}

#[test]
fn units_are_resolved() {
    let text =
        "[pager]\nram_bytes = \"3GiB\"\nlease = \"2m\"\n[executor]\ndevice = \"cuda:3\"\n[nats]\nurl = \"nats://h:1\"";
    let config = Config::parse(text, &none()).unwrap();
    assert_eq!((config.pager.ram_bytes, config.pager.lease), (3 << 30, Duration::from_secs(120)));
    assert_eq!(config.executor.device, DeviceChoice::Cuda(3));
    assert_eq!(config.nats.url, NatsUrl::Url("nats://h:1".into()));
}

#[test]
fn tenant_weights_are_read_from_the_last_equals_sign() {
    let text = "[scheduler]\ntenant_weights = [\"gold=4\", \"a=b=2\"]\nageing = \"0s\"";
    let scheduler = Config::parse(text, &none()).unwrap().scheduler;
    let weights: Vec<_> = scheduler.tenant_weights.iter().map(|(tenant, weight)| (tenant.as_str(), *weight)).collect();
    assert_eq!(weights, [("a=b", 2), ("gold", 4)]);
    assert_eq!(scheduler.ageing, Duration::ZERO);
    for (bad, says) in [("gold", "weight"), ("gold=0", "weight"), ("gold=1001", "weight"), ("g=1\", \"g=2", "twice")] {
        let found = problems(&format!("[scheduler]\ntenant_weights = [\"{bad}\"]"));
        assert!(found.len() == 1 && found[0].contains("tenant_weights") && found[0].contains(says), "{bad}: {found:?}");
    }
}

#[test]
fn models_may_be_none_or_several() {
    assert!(Config::parse("models = []", &none()).unwrap().default_model().is_none());
    let two = "[[models]]\nname = \"a\"\npath = \"x\"\ndefault = false\n[[models]]\nname = \"b\"\npath = \"y\"";
    let config = Config::parse(two, &none()).unwrap();
    assert_eq!(config.default_model().unwrap().name.as_str(), "b");
    assert_eq!(config.model(&"a".to_string().try_into().unwrap()).unwrap().path, "x");
}

#[test]
fn the_environment_wins_and_is_checked_like_the_file() {
    let lookup = |pairs: &'static [(&'static str, &'static str)]| {
        Environment::from_lookup(move |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
    };
    let environment = lookup(&[
        ("MILLRACE_NATS_URL", "nats://other:4222"),
        ("MILLRACE_NATS_SERVER", "/opt/nats-server"),
        ("MILLRACE_LOG", "debug"),
        ("MILLRACE_DEVICE", "cpu"),
        ("MILLRACE_LISTEN", ""),
        ("HOME", "/home/me"),
    ]);
    let config = Config::parse("[nats]\nurl = \"nats://file:1\"\nserver_path = \"/x\"", &environment).unwrap();
    assert_eq!(config.nats.url, NatsUrl::Url("nats://other:4222".into()));
    assert_eq!(config.nats.server_path.as_deref(), Some(Path::new("/opt/nats-server")));
    assert_eq!((config.telemetry.log_filter.as_str(), config.executor.device), ("debug", DeviceChoice::Cpu));
    assert_eq!(config.telemetry.listen.port(), 0);
    assert_eq!(config.nats.store_dir, Path::new("/home/me/.local/state/millrace/nats"));
    let wrong = Config::parse("", &lookup(&[("MILLRACE_DEVICE", "tpu")])).unwrap_err().to_string();
    assert!(wrong.contains("[executor] device"), "{wrong}");
}

#[test]
fn files_are_found_and_named_in_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (named, other) = (dir.path().join("a.toml"), dir.path().join("b.toml"));
    std::fs::write(&named, "[scheduler]\nwaiting = 7").unwrap();
    std::fs::write(&other, "[scheduler]\nstep_tokens = 0").unwrap();
    let environment = Environment { config_path: Some(other.clone()), ..none() };
    assert_eq!(Config::load_with(Some(&named), &environment).unwrap().scheduler.waiting, 7);
    let error = Config::load_with(None, &environment).unwrap_err().to_string();
    assert!(error.contains("b.toml") && error.contains("[scheduler] step_tokens"), "{error}");
    let missing = PathBuf::from("/nonexistent/pipeline.toml");
    let error = Config::load_with(Some(&missing), &none()).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/pipeline.toml: "), "{error}");
}

proptest! {
    #[test]
    fn no_text_brings_the_parser_down(text in "\\PC{0,40}", key in "[a-z_]{1,20}") {
        let _ = Config::parse(&text, &none());
        let quoted = toml::Value::String(text);
        let _ = Config::parse(&format!("[nats]\n{key} = {quoted}"), &none());
        let _ = Config::parse(&format!("[pager]\nram_bytes = {quoted}\nlease = {quoted}"), &none());
    }
}
