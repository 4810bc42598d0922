//! Where captions go: standard output in the files' order, faults to standard error, progress to the board.

use std::io::Write;

use millrace_protocol::JobId;
use millrace_protocol::output::{Final, Status};

use super::order::InOrder;
use super::progress::{Board, Uploads};
use super::render::{CaptionRecord, Place, caption_line, failure_line};
use super::run::WindowJob;
use crate::service::Service;

struct Shown {
    place: Place,
    job: JobId,
    text: String,
    running: bool,
}

/// Collects events and prints.
pub struct View {
    board: Board,
    json: bool,
    with_path: bool,
    windows: Vec<Shown>,
    order: InOrder<(usize, Final)>,
    failed: usize,
}

impl View {
    /// A view that prints `json` lines or text; `with_path` puts the file's name before each caption.
    pub fn new(board: Board, json: bool, with_path: bool) -> Self {
        Self { board, json, with_path, windows: Vec::new(), order: InOrder::default(), failed: 0 }
    }

    /// Takes the list of windows.
    pub fn expect(&mut self, jobs: &[WindowJob<'_>]) {
        let shown = |job: &WindowJob<'_>| Shown {
            place: job.place(),
            job: job.id.clone(),
            text: String::new(),
            running: false,
        };
        self.windows = jobs.iter().map(shown).collect();
        self.board.expect(u64::try_from(jobs.len()).unwrap_or(u64::MAX));
    }

    /// The bars of uploads.
    pub fn uploads(&self) -> Uploads {
        self.board.uploads()
    }

    /// A window is being worked on.
    pub fn start(&mut self, number: usize) {
        if let Some(window) = self.windows.get_mut(number) {
            window.running = true;
            let label = match window.place.label(self.with_path) {
                label if label.is_empty() => window.place.path.clone(),
                label => label,
            };
            self.board.start(number, &label);
        }
    }

    /// A window's text grew.
    pub fn grow(&mut self, number: usize, text: &str, tokens: usize) {
        if let Some(window) = self.windows.get_mut(number) {
            window.text.push_str(text);
            self.board.grow(number, &window.text, tokens);
        }
    }

    /// A window ended: prints every caption that is now due.
    ///
    /// # Errors
    /// Standard output refused the text.
    pub fn end(&mut self, number: usize, last: Final) -> std::io::Result<()> {
        if let Some(window) = self.windows.get_mut(number) {
            window.running = false;
        }
        self.board.done(number);
        for (number, last) in self.order.push(number, (number, last)) {
            self.print(number, &last)?;
        }
        Ok(())
    }

    fn print(&mut self, number: usize, last: &Final) -> std::io::Result<()> {
        let Some(window) = self.windows.get(number) else { return Ok(()) };
        let done = last.status == Status::Done;
        self.failed += usize::from(!done);
        let (json, with_path) = (self.json, self.with_path);
        self.board.print(number, || {
            let mut out = std::io::stdout().lock();
            if json {
                serde_json::to_writer(&mut out, &CaptionRecord::new(&window.place, window.job.as_str(), last))?;
                writeln!(out)?;
            } else if done {
                writeln!(out, "{}", caption_line(&window.place, with_path, &last.text))?;
            }
            if !done {
                eprintln!("{}", failure_line(&window.place, last));
            }
            out.flush()
        })
    }

    /// Asks the service to drop what still runs.
    pub async fn cancel(&self, service: &Service) {
        for window in self.windows.iter().filter(|window| window.running) {
            // The command is ending anyway; a job that cannot be cancelled runs to its end.
            let _ = service.cancel(&window.job).await;
        }
    }

    /// Prints what is still held back and takes the display away. True if every window ended well.
    ///
    /// # Errors
    /// Standard output refused the text.
    pub fn close(mut self) -> std::io::Result<bool> {
        self.board.close();
        for (number, last) in std::mem::take(&mut self.order).into_rest() {
            self.print(number, &last)?;
        }
        Ok(self.failed == 0)
    }
}
