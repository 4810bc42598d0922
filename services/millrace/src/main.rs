//! The `millrace` program: reads the command line, runs one command, turns its outcome into an exit code.

use std::process::ExitCode;

use clap::Parser;
use millrace::cli::{self, Cli};
use millrace::exit;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for, not faults; clap knows which stream each belongs to.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { exit::USAGE } else { exit::OK });
        }
    };
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => match runtime.block_on(cli::run(cli)) {
            Ok(code) => code,
            Err(error) if exit::is_broken_pipe(&error) => ExitCode::from(exit::PIPE),
            Err(error) => {
                eprintln!("millrace: {error:#}");
                exit::code_of(&error)
            }
        },
        Err(error) => {
            eprintln!("millrace: cannot start: {error}");
            ExitCode::from(exit::FAILED)
        }
    }
}
