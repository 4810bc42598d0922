//! The command line as a newcomer uses it.

use std::collections::BTreeMap;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use millrace_tests::cluster::{Cluster, MODEL};
use millrace_tests::service::binary;
use millrace_tests::workspace::root;
use serde::Deserialize;
use tokio::process::Command;

#[derive(Deserialize)]
struct Expected {
    clips: Vec<File>,
    stills: Vec<Still>,
}

#[derive(Deserialize)]
struct File {
    file: String,
    scenes: Vec<Scene>,
}

#[derive(Deserialize)]
struct Scene {
    start_secs: f64,
    /// What transformers says about a clip of one scene (deploy/demo/train/answer_media.py).
    answer: Option<String>,
}

#[derive(Deserialize)]
struct Still {
    file: String,
    answer: String,
}

fn expected() -> Result<Expected> {
    let path = root().join("deploy/demo/clips/expected.json");
    Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?)
}

async fn millrace(args: &[&str]) -> Result<Output> {
    let output = Command::new(binary()?).args(args).current_dir(root()).output().await?;
    Ok(output)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One command, no service running: everything starts, captions, stops.
#[tokio::test]
async fn caption_alone_captions_the_shipped_clips_and_stills() -> Result<()> {
    let state = tempfile::tempdir()?;
    let config = state.path().join("pipeline.toml");
    let place = state.path().display();
    let toml = format!("[nats]\nurl = \"managed\"\nstore_dir = \"{place}/nats\"\n[pager]\ndir = \"{place}/pages\"\n");
    std::fs::write(&config, toml)?;
    let expected = expected()?;
    let folder = root().join("deploy/demo/clips");
    let mut args = vec!["caption".to_owned(), "--json".into(), "--config".into(), config.display().to_string()];
    args.extend(["--model".into(), root().join("deploy/demo/model").display().to_string()]);
    let files = expected.clips.iter().map(|clip| &clip.file).chain(expected.stills.iter().map(|still| &still.file));
    args.extend(files.map(|file| folder.join(file).display().to_string()));
    let output = millrace(&args.iter().map(String::as_str).collect::<Vec<_>>()).await?;
    let printed = text(&output.stdout);
    ensure!(output.status.success(), "exit {:?}: {}", output.status.code(), text(&output.stderr));

    let mut captions: BTreeMap<String, BTreeMap<u64, String>> = BTreeMap::new();
    for line in printed.lines() {
        let line: serde_json::Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let path = line["path"].as_str().context("path")?;
        let file = path.rsplit('/').next().unwrap_or(path).to_owned();
        let start_ms = (line["start"].as_f64().unwrap_or(0.0) * 1e3) as u64;
        captions.entry(file).or_default().insert(start_ms, line["caption"].as_str().context("caption")?.to_owned());
    }
    for still in &expected.stills {
        let said: Vec<&String> = captions[&still.file].values().collect();
        assert_eq!(said, [&still.answer], "{}", still.file);
    }
    for clip in expected.clips.iter().filter(|clip| clip.scenes.len() == 1) {
        assert_eq!(captions[&clip.file].get(&0), clip.scenes[0].answer.as_ref(), "{}", clip.file);
        assert_eq!(clip.scenes[0].start_secs, 0.0);
    }
    let cut = &expected.clips.iter().find(|clip| clip.scenes.len() > 1).context("a clip of several scenes")?.file;
    assert_eq!(captions[cut].keys().collect::<Vec<_>>(), [&0, &8_000], "two windows of the default length");
    Ok(())
}

#[tokio::test]
async fn check_prints_every_fault_at_once() -> Result<()> {
    let state = tempfile::tempdir()?;
    let config = state.path().join("pipeline.toml");
    std::fs::write(&config, "[scheduler]\nstep_tokens = 0\n[nats]\nrequest_timeout = \"soon\"\n")?;
    let output = millrace(&["check", "--config", &config.display().to_string()]).await?;
    assert_eq!(output.status.code(), Some(64));
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(said.contains("step_tokens") && said.contains("request_timeout"), "{said}");

    std::fs::write(&config, "[scheduler]\nstep_tokenz = 1\n")?;
    let output = millrace(&["up", "--config", &config.display().to_string()]).await?;
    assert_eq!(output.status.code(), Some(64));
    assert!(text(&output.stderr).contains("step_tokenz"), "{}", text(&output.stderr));

    let empty = state.path().join("empty");
    std::fs::create_dir(&empty)?;
    std::fs::write(&config, format!("[[models]]\nname = \"gone\"\npath = \"{}\"\n", empty.display()))?;
    let output = millrace(&["check", "--config", &config.display().to_string()]).await?;
    assert_eq!(output.status.code(), Some(64));
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(said.contains("config.json") && said.contains("tokenizer.json"), "{said}");
    Ok(())
}

#[tokio::test]
async fn submit_result_cancel_and_status_work_on_a_running_service() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let url = cluster.bus.url().to_owned();
    let job = cluster.config("job", "")?.with_extension("json");
    std::fs::write(&job, serde_json::to_string(&millrace_tests::samples::committed()?[0].job()?)?)?;
    let submit = ["submit", &job.display().to_string(), "--model", MODEL, "--id", "by-hand", "--nats", &url, "--wait"];
    let output = millrace(&submit).await?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let truth = &millrace_tests::samples::committed()?[0].text_f32;
    assert!(said.contains(truth.as_str()), "{said}");

    let output = millrace(&["result", "by-hand", "--nats", &url, "--json"]).await?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("\"done\""), "{}", text(&output.stdout));

    let output = millrace(&["cancel", "by-hand", "--nats", &url]).await?;
    ensure!(output.status.success(), "{}", text(&output.stderr));

    let output = millrace(&["status", "--nats", &url, "--json"]).await?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    for name in ["millrace-preprocess", "millrace-schedule", "millrace-execute", "MILLRACE_V1_JOBS"] {
        assert!(said.contains(name), "{name} is not in {said}");
    }
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}
