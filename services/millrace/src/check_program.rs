//! Whether a program that the service starts is there, and in which version.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::cli::check::Verdict;

const TIME_LIMIT: Duration = Duration::from_secs(10);

/// A program to look at.
#[derive(Debug)]
pub struct Program {
    name: &'static str,
    path: PathBuf,
    flag: &'static str,
    oldest: Option<&'static str>,
    key: &'static str,
}

impl Program {
    /// `path` answers `flag` with its version, which must be `oldest` or later; `key` sets the path.
    pub fn new(
        name: &'static str,
        path: &Path,
        flag: &'static str,
        oldest: Option<&'static str>,
        key: &'static str,
    ) -> Self {
        Self { name, path: path.to_path_buf(), flag, oldest, key }
    }
}

/// Starts the program for its version.
pub async fn check_program(program: &Program) -> Verdict {
    let outcome = version_of(program).await.map_err(|fault| vec![fault]);
    Verdict { subject: program.name.to_string(), outcome }
}

async fn version_of(program: &Program) -> Result<String, String> {
    let Program { name, path, key, .. } = program;
    let shown = path.display();
    let fix = format!("install {name}, or set {key}");
    let mut command = Command::new(path);
    command.arg(program.flag).stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(TIME_LIMIT, command.output()).await {
        Err(_) => return Err(format!("{shown} {} does not end; {fix}", program.flag)),
        Ok(Err(error)) => return Err(format!("{shown}: {error}; {fix}")),
        Ok(Ok(output)) => output,
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(version) = version_in(&text) else {
        return Err(format!("{shown} {} names no version; {fix}", program.flag));
    };
    match program.oldest {
        Some(oldest) if numbers(version) < numbers(oldest) => {
            Err(format!("{shown} is version {version}, but {oldest} or later is needed; {fix}"))
        }
        _ => Ok(format!("{version} ({shown})")),
    }
}

/// The first word of the first line that starts with a digit, without a leading `v`.
fn version_in(text: &str) -> Option<&str> {
    let words = text.lines().next()?.split_whitespace();
    words.map(|word| word.strip_prefix('v').unwrap_or(word)).find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
}

/// The leading numbers of a version, for comparison.
fn numbers(version: &str) -> Vec<u64> {
    let number = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    version.split(['-', '+']).next().unwrap_or_default().split('.').map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_and_compared_as_numbers() {
        assert_eq!(version_in("ffmpeg version 5.1.9-0+deb12u1 Copyright (c) 2000"), Some("5.1.9-0+deb12u1"));
        assert_eq!(version_in("nats-server: v2.15.1"), Some("2.15.1"));
        assert_eq!(version_in("no number"), None);
        assert!(numbers("2.9.10") < numbers("2.15.1"));
        assert!(numbers("2.15.1-beta.2") >= numbers("2.15.1"));
        assert!(numbers("3.0") > numbers("2.15.1"));
    }

    async fn outcome(path: &str, oldest: Option<&'static str>) -> Result<String, String> {
        version_of(&Program::new("ffmpeg", Path::new(path), "-version", oldest, "[preprocess] ffmpeg")).await
    }

    #[tokio::test]
    async fn a_real_program_is_found_and_faults_name_the_key() {
        assert!(outcome("ffmpeg", Some("4")).await.unwrap().ends_with("(ffmpeg)"));
        assert!(outcome("ffmpeg", Some("99")).await.unwrap_err().contains("99 or later"));
        assert!(outcome("/no/ffmpeg", None).await.unwrap_err().ends_with("or set [preprocess] ffmpeg"));
        assert!(outcome("/bin/true", None).await.unwrap_err().contains("names no version"));
    }
}
