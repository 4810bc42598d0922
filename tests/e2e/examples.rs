//! The Python and Rust examples run as they are documented.

use anyhow::{Context, Result, ensure};
use millrace_tests::cluster::{Cluster, MODEL};
use millrace_tests::service::binary;
use millrace_tests::workspace::root;
use tokio::process::Command;

/// Path and true caption of a shipped still that the demo model gets right.
fn still() -> Result<(std::path::PathBuf, String)> {
    let expected = std::fs::read_to_string(root().join("deploy/demo/clips/expected.json"))?;
    let expected: serde_json::Value = serde_json::from_str(&expected)?;
    let stills = expected["stills"].as_array().context("stills")?;
    let truth = stills.iter().find(|still| still["file"] == "one-shape.png").context("one-shape.png")?;
    let caption = truth["caption"].as_str().context("caption")?;
    Ok((root().join("deploy/demo/clips/one-shape.png"), caption.to_owned()))
}

async fn says(command: &mut Command, caption: &str) -> Result<()> {
    let output = command.output().await?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(said.contains(caption), "{caption:?} is not in {said:?}");
    Ok(())
}

#[tokio::test]
#[allow(clippy::disallowed_methods)] // run.sh says where its Python is.
async fn the_python_example_captions_a_still() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let python =
        std::env::var("MILLRACE_TEST_PYTHON").context("MILLRACE_TEST_PYTHON is not set: run ./tests/run.sh")?;
    let (path, caption) = still()?;
    let mut command = Command::new(python);
    command.arg(root().join("deploy/examples/python/caption.py"));
    says(command.args(["--nats", cluster.bus.url(), "--model", MODEL]).arg(path), &caption).await?;
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}

#[tokio::test]
async fn the_rust_example_captions_a_still() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let example = binary()?.with_file_name("examples").join("submit");
    ensure!(example.exists(), "{} is not built: cargo build -p millrace --example submit", example.display());
    let (path, caption) = still()?;
    let mut command = Command::new(example);
    says(command.args([cluster.bus.url(), MODEL]).arg(path).arg("Describe the image."), &caption).await?;
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}
