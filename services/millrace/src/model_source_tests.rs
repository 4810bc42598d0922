//! Arguments, file choice, and transfers from a hub on loopback that speaks what hf-hub reads.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use super::*;
use crate::exit::code_of;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub that serves `files` of `lab/tiny` and writes down which it was asked for. Ends with the test process.
fn hub(files: Vec<(&'static str, &'static [u8])>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let request = lines.next().unwrap().unwrap();
            let path = request.split(' ').nth(1).unwrap().to_string();
            let range = lines
                .map_while(Result::ok)
                .take_while(|line| !line.is_empty())
                .find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_string));
            let answer = answer(&path, range.as_deref(), &files, &log);
            stream.write_all(&answer).unwrap();
        }
    });
    (endpoint, asked)
}

fn answer(path: &str, range: Option<&str>, files: &[(&str, &[u8])], log: &Mutex<Vec<String>>) -> Vec<u8> {
    let respond = |status: &str, headers: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
        [head.as_bytes(), body].concat()
    };
    if path == "/api/models/lab/tiny/revision/main" {
        let names: Vec<_> = files.iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": names }).to_string();
        return respond("200 OK", "Content-Type: application/json\r\n", body.as_bytes());
    }
    let name = path.strip_prefix(&format!("/lab/tiny/resolve/{COMMIT}/")).unwrap_or_default();
    let Some((_, bytes)) = files.iter().find(|(file, _)| *file == name) else {
        return respond("404 Not Found", "", b"");
    };
    let (first, last) = range.and_then(|range| range.split_once('-')).unwrap();
    let first: usize = first.parse().unwrap();
    let end = last.parse::<usize>().map_or(bytes.len(), |last| (last + 1).min(bytes.len()));
    if last.is_empty() {
        log.lock().unwrap().push(name.to_string());
    }
    let total = bytes.len();
    let headers = format!(
        "X-Repo-Commit: {COMMIT}\r\nETag: \"{name}-1\"\r\nContent-Range: bytes {first}-{}/{total}\r\n",
        end - 1
    );
    respond("206 Partial Content", &headers, &bytes[first..end])
}

fn to_hub(cache: &Path, endpoint: &str) -> Hub {
    Hub { cache: Some(cache.to_path_buf()), endpoint: Some(endpoint.to_string()) }
}

#[test]
fn only_needed_files_are_fetched_and_only_once() {
    let cache = tempfile::tempdir().unwrap();
    let index = br#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    let (endpoint, asked) = hub(vec![
        ("README.md", b"words"),
        ("config.json", b"{}"),
        ("chat_template.jinja", b"x"),
        ("consolidated.safetensors", b"unused"),
        ("model-1.safetensors", b"first"),
        ("model-2.safetensors", b"second"),
        (INDEX, index),
        ("onnx/model.json", b"{}"),
        ("pytorch_model.bin", b"unused"),
    ]);
    let folder = fetch("lab/tiny", "main", &to_hub(cache.path(), &endpoint)).unwrap();
    assert_eq!(folder, cache.path().join("models--lab--tiny/snapshots").join(COMMIT));
    let expected = [INDEX, "chat_template.jinja", "config.json", "model-1.safetensors", "model-2.safetensors"];
    assert_eq!(*asked.lock().unwrap(), expected);
    assert_eq!(std::fs::read(folder.join("model-2.safetensors")).unwrap(), b"second");

    assert_eq!(fetch("lab/tiny", "main", &to_hub(cache.path(), &endpoint)).unwrap(), folder);
    assert_eq!(asked.lock().unwrap().len(), 5, "nothing is fetched twice");

    let offline = fetch("lab/tiny", "main", &to_hub(cache.path(), "http://127.0.0.1:1")).unwrap();
    assert_eq!(offline, folder, "the cache stands in for a hub that is away");
    std::fs::remove_file(folder.join("model-2.safetensors")).unwrap();
    let fault = fetch("lab/tiny", "main", &to_hub(cache.path(), "http://127.0.0.1:1")).unwrap_err();
    assert_eq!(code_of(&fault), std::process::ExitCode::from(69), "but not with a shard missing");
}

#[test]
fn faults_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let (endpoint, _) = hub(vec![("config.json", b"{}")]);
    let fault = |id: &str, endpoint: &str| fetch(id, "main", &to_hub(cache.path(), endpoint)).unwrap_err();

    let away = fault("lab/tiny", "http://127.0.0.1:1");
    assert_eq!(code_of(&away), std::process::ExitCode::from(69));
    assert!(away.to_string().contains("--model DIR"), "{away}");

    let unknown = fault("lab/other", &endpoint);
    assert_eq!(code_of(&unknown), std::process::ExitCode::from(64));
    assert!(unknown.to_string().contains("no such repository"), "{unknown}");

    assert!(fault("lab/tiny", &endpoint).to_string().contains("no .safetensors"));
}

#[test]
fn a_folder_wins_over_a_repository_and_gives_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.v1");
    std::fs::create_dir(&model).unwrap();
    let arg = ModelArg::parse(model.to_str().unwrap()).unwrap();
    assert_eq!(arg.name.as_str(), "tiny_v1");
    assert!(matches!(&arg.place, ModelPlace::Folder(path) if path.ends_with("tiny.v1")));
    let named = ModelArg::parse(&format!("{}=demo", model.display())).unwrap();
    assert_eq!(named.name.as_str(), "demo");
}

#[test]
fn a_repository_has_an_owner_and_perhaps_a_revision() {
    let repository = |id: &str, revision: &str| ModelPlace::Repository { id: id.into(), revision: revision.into() };
    let arg = ModelArg::parse("Qwen/Qwen3-VL-2B.x").unwrap();
    assert_eq!((arg.name.as_str(), arg.place), ("Qwen3-VL-2B_x", repository("Qwen/Qwen3-VL-2B.x", "main")));
    let arg = ModelArg::parse("lab/tiny@v2=demo").unwrap();
    assert_eq!((arg.name.as_str(), arg.place), ("demo", repository("lab/tiny", "v2")));
    for bad in ["", "nowhere", "./no/folder", "/no/such", "a/b/c", "lab/tiny=a.b", "lab/tiny@", "../x", "a//b"] {
        let fault = ModelArg::parse(bad).unwrap_err();
        assert_eq!(code_of(&fault), std::process::ExitCode::from(64), "{bad}: {fault}");
    }
}
