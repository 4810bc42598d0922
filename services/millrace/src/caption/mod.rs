//! What `millrace caption` does: files to windows, windows to jobs, chunks to text. `kind`, `window`, `timecode`, `job`,
//! `order` and `render` are pure; `input` and `probe` touch the file, `run` the service, `progress` and `view` the
//! terminal.

pub mod input;
pub mod job;
pub mod kind;
pub mod order;
pub mod plan;
pub mod probe;
pub mod progress;
pub mod render;
pub mod run;
pub mod timecode;
pub mod view;
pub mod window;
