//! Prints one job's output as it is stored: text as it grows, or the chunks as JSON lines.

use std::io::Write;

use futures::StreamExt;
use millrace_protocol::output::{Chunk, Status};
use millrace_protocol::{JobId, OutputChunk};

use crate::service::Service;

/// Follows `job` to its end. True if it was answered.
///
/// # Errors
/// The bus's, or standard output's.
pub async fn follow(service: &Service, job: &JobId, json: bool) -> anyhow::Result<bool> {
    let mut chunks = service.follow(job, None);
    let mut printer = Printer::new(json);
    while let Some(chunk) = chunks.next().await {
        if let Some(done) = printer.print(&chunk?, &mut std::io::stdout().lock(), &mut std::io::stderr())? {
            return Ok(done);
        }
    }
    anyhow::bail!("{job}: the output ended without a final message")
}

/// Turns chunks into what is printed.
#[derive(Debug)]
pub struct Printer {
    json: bool,
    shown_bytes: usize,
}

impl Printer {
    /// A printer of text, or of JSON lines.
    pub fn new(json: bool) -> Self {
        Self { json, shown_bytes: 0 }
    }

    /// Prints one chunk; answers to `out`, why there is none to `faults`. `Some` at the end: whether it was answered.
    ///
    /// # Errors
    /// A writer's.
    pub fn print(
        &mut self,
        chunk: &OutputChunk,
        out: &mut dyn Write,
        faults: &mut dyn Write,
    ) -> anyhow::Result<Option<bool>> {
        if self.json {
            serde_json::to_writer(&mut *out, chunk)?;
            writeln!(out)?;
        }
        let ended = match &chunk.chunk {
            Chunk::Claim { .. } => None,
            Chunk::Delta { text, .. } => {
                self.shown_bytes += text.len();
                if !self.json {
                    write!(out, "{text}")?;
                }
                None
            }
            Chunk::Final(last) => {
                let rest = last.text.get(self.shown_bytes..).unwrap_or_default();
                if !self.json && (last.status == Status::Done || !last.text.is_empty()) {
                    // A job that does not stream has its whole text here.
                    writeln!(out, "{rest}")?;
                }
                if let Some(error) = &last.error {
                    let (job, status) = (&chunk.job, last.status.as_str());
                    writeln!(faults, "{job}: {status} [{}]: {}", error.code.as_str(), error.message)?;
                }
                Some(last.status == Status::Done)
            }
        };
        out.flush()?;
        Ok(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(json: bool, chunks: &[&str]) -> (String, String, Option<bool>) {
        let (mut out, mut faults, mut printer) = (Vec::new(), Vec::new(), Printer::new(json));
        let mut ended = None;
        for text in chunks {
            ended = printer.print(&serde_json::from_str(text).unwrap(), &mut out, &mut faults).unwrap();
        }
        (String::from_utf8(out).unwrap(), String::from_utf8(faults).unwrap(), ended)
    }

    const CLAIM: &str = r#"{"v":1,"job":"a","index":0,"kind":"claim","owner":"s","job_seq":1,"attempt":1}"#;
    const DELTA: &str = r#"{"v":1,"job":"a","index":0,"kind":"delta","token_ids":[1],"text":"a red"}"#;
    const DONE: &str = concat!(
        r#"{"v":1,"job":"a","index":2,"kind":"final","status":"done","finish_reason":"stop","text":"a red circle","#,
        r#""token_ids":[1,2],"usage":{"prompt_tokens":1,"cached_tokens":0,"completion_tokens":3},"#,
        r#""timings":{"preprocess_ms":0.0,"queue_ms":0.0,"first_token_ms":0.0,"total_ms":0.0}}"#
    );
    const REJECTED: &str = concat!(
        r#"{"v":1,"job":"a","index":0,"kind":"final","status":"rejected","error":{"code":"no_prompt","number":400,"message":"Say something."},"#,
        r#""text":"","token_ids":[],"usage":{"prompt_tokens":0,"cached_tokens":0,"completion_tokens":0}}"#
    );

    #[test]
    fn text_grows_and_the_final_adds_only_what_is_new() {
        let (out, faults, ended) = printed(false, &[CLAIM, DELTA, DONE]);
        assert_eq!((out.as_str(), faults.as_str(), ended), ("a red circle\n", "", Some(true)));
        assert_eq!(printed(false, &[DONE]).0, "a red circle\n");
        assert_eq!(printed(false, &[CLAIM, DELTA]).2, None);
    }

    #[test]
    fn a_refusal_goes_to_standard_error_with_its_code() {
        let (out, faults, ended) = printed(false, &[REJECTED]);
        assert_eq!(
            (out.as_str(), faults.as_str(), ended),
            ("", "a: rejected [no_prompt]: Say something.\n", Some(false))
        );
    }

    #[test]
    fn json_repeats_the_chunks() {
        assert_eq!(printed(true, &[CLAIM, DELTA, DONE]).0, format!("{CLAIM}\n{DELTA}\n{DONE}\n"));
    }
}
