//! What a person sees on standard error while captions are made: one growing line per running window and a bar with
//! captions done and tokens per second. Draws nothing unless standard error is a terminal; never writes captions.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use millrace_runtime::Clock;

/// Columns of a growing line: terminals of 80 columns show it whole.
const LIVE_COLUMNS: usize = 78;

/// The progress display.
pub struct Board {
    multi: MultiProgress,
    total: ProgressBar,
    running: BTreeMap<usize, ProgressBar>,
    tokens: u64,
    first_token_at: Option<Instant>,
    clock: Clock,
}

impl Board {
    /// A display; a hidden one draws nothing.
    pub fn new(clock: Clock, hidden: bool) -> Self {
        let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let multi = MultiProgress::with_draw_target(target);
        let total = multi.add(ProgressBar::new(0).with_style(style("{spinner} {msg} {elapsed:.dim}")));
        if !multi.is_hidden() {
            total.enable_steady_tick(Duration::from_millis(120));
        }
        Self { multi, total, running: BTreeMap::new(), tokens: 0, first_token_at: None, clock }
    }

    /// Says what goes on before the first window runs.
    pub fn say(&self, text: impl Into<String>) {
        self.total.set_message(text.into());
    }

    /// A handle that shows uploads while the board itself is in use.
    pub fn uploads(&self) -> Uploads {
        Uploads { multi: self.multi.clone(), total: self.total.clone() }
    }

    /// From now on `windows` more jobs count.
    pub fn expect(&mut self, windows: u64) {
        self.total.set_style(style("{spinner} {bar:24} {pos}/{len} captions  {msg}  {elapsed:.dim}"));
        self.total.inc_length(windows);
    }

    /// Window `number` was published.
    pub fn start(&mut self, number: usize, label: &str) {
        let bar =
            ProgressBar::new_spinner().with_style(style("{prefix:.dim} {wide_msg}")).with_prefix(label.to_string());
        self.running.insert(number, self.multi.insert_before(&self.total, bar));
    }

    /// Window `number` shows `text` now, with `tokens` more than before.
    pub fn grow(&mut self, number: usize, text: &str, tokens: usize) {
        if let Some(bar) = self.running.get(&number) {
            let columns = LIVE_COLUMNS.saturating_sub(bar.prefix().chars().count() + 1);
            bar.set_message(tail(text, columns));
        }
        let now = self.clock.now();
        let since = *self.first_token_at.get_or_insert(now);
        self.tokens += u64::try_from(tokens).unwrap_or(0);
        self.total.set_message(rate(self.tokens, now.saturating_duration_since(since)));
    }

    /// Window `number` ended; its line goes when [`Board::print`] shows the caption.
    pub fn done(&mut self, number: usize) {
        self.total.inc(1);
        if let Some(bar) = self.running.get(&number) {
            bar.tick();
        }
    }

    /// Takes window `number`'s line away and writes above the display.
    pub fn print(&mut self, number: usize, write: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        if let Some(bar) = self.running.remove(&number) {
            bar.finish_and_clear();
            self.multi.remove(&bar);
        }
        self.multi.suspend(write)
    }

    /// Takes the whole display away; what is printed afterwards stands alone.
    pub fn close(&mut self) {
        // A terminal that cannot be cleared is not worth a fault.
        let _ = self.multi.clear();
        self.multi.set_draw_target(ProgressDrawTarget::hidden());
        self.total.finish_and_clear();
        self.running.clear();
    }
}

/// Shows files on their way into the media bucket.
pub struct Uploads {
    multi: MultiProgress,
    total: ProgressBar,
}

impl Uploads {
    /// A bar of bytes; clear it when the file is stored.
    pub fn start(&self, name: &str, size_bytes: u64) -> ProgressBar {
        let bar = ProgressBar::new(size_bytes);
        let bar = bar.with_style(style("  {msg} {bar:24} {bytes}/{total_bytes} {bytes_per_sec}"));
        let bar = self.multi.insert_before(&self.total, bar);
        bar.set_message(format!("storing {name}"));
        bar
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates here are constants; should one not parse, a plain bar is better than none.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Tokens per second, once there is time to divide by.
fn rate(tokens: u64, over: Duration) -> String {
    if over < Duration::from_millis(200) {
        return format!("{tokens} tokens");
    }
    let tokens = f64::from(u32::try_from(tokens).unwrap_or(u32::MAX));
    format!("{:.1} tokens/s", tokens / over.as_secs_f64())
}

/// The end of `text` on one line of at most `columns` characters.
fn tail(text: &str, columns: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let length = line.chars().count();
    if length <= columns {
        return line;
    }
    let kept = columns.saturating_sub(1);
    format!("…{}", line.chars().skip(length - kept).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_growing_line_shows_its_end() {
        assert_eq!(tail("a red\ncircle ", 20), "a red circle");
        assert_eq!(tail("abcdefghij", 5), "…ghij");
        assert_eq!(tail("äöüäöü", 3), "…öü");
        assert_eq!(tail("abc", 0), "…");
    }

    #[test]
    fn a_rate_needs_time() {
        assert_eq!(rate(7, Duration::from_millis(100)), "7 tokens");
        assert_eq!(rate(30, Duration::from_secs(2)), "15.0 tokens/s");
    }

    #[test]
    fn a_hidden_board_counts_and_prints() {
        let (clock, hand) = Clock::manual(0);
        let mut board = Board::new(clock, true);
        board.expect(2);
        board.start(0, "[a]");
        board.grow(0, "x", 3);
        hand.advance(Duration::from_secs(1));
        board.grow(0, "x y", 3);
        assert_eq!(board.total.message(), "6.0 tokens/s");
        board.done(0);
        let mut printed = false;
        board
            .print(0, || {
                printed = true;
                Ok(())
            })
            .unwrap();
        assert!(printed);
        assert_eq!((board.total.position(), board.total.length()), (1, Some(2)));
        board.close();
    }
}
