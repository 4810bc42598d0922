//! The Python example runs as it is documented.

use anyhow::{Context, Result, ensure};
use millrace_tests::cluster::{Cluster, MODEL};
use millrace_tests::workspace::root;
use tokio::process::Command;

#[tokio::test]
#[allow(clippy::disallowed_methods)] // run.sh says where its Python is.
async fn the_python_example_captions_a_still() -> Result<()> {
    let cluster = Cluster::start().await?;
    let service = cluster.run("up").await?;
    let python =
        std::env::var("MILLRACE_TEST_PYTHON").context("MILLRACE_TEST_PYTHON is not set: run ./tests/run.sh")?;
    let still = root().join("deploy/demo/clips/one-shape.png");
    let output = Command::new(python)
        .arg(root().join("deploy/examples/python/caption.py"))
        .args(["--nats", cluster.bus.url(), "--model", MODEL])
        .arg(&still)
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let expected = std::fs::read_to_string(root().join("deploy/demo/clips/expected.json"))?;
    let expected: serde_json::Value = serde_json::from_str(&expected)?;
    let stills = expected["stills"].as_array().context("stills")?;
    let truth = stills.iter().find(|still| still["file"] == "one-shape.png").context("one-shape.png")?;
    let caption = truth["caption"].as_str().context("caption")?;
    assert!(said.contains(caption), "{caption:?} is not in {said:?}");
    assert_eq!(service.terminate().await?, 0);
    Ok(())
}
