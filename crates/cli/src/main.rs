//! The `ds4` binary: a thin layer of flags, progress and printing over the libraries.
#![forbid(unsafe_code)]
// Printing is this binary's job.
#![allow(clippy::print_stdout, clippy::print_stderr)]

/// Like the standard one, but where nobody reads any more, the program ends instead of panicking.
macro_rules! println {
    () => { $crate::ui::print_line(format_args!("")) };
    ($($arg:tt)*) => { $crate::ui::print_line(format_args!($($arg)*)) };
}

mod args;
mod commands;
mod device;
#[cfg(any(feature = "cuda", feature = "vulkan", feature = "metal", target_os = "macos"))]
mod gpu;
#[cfg(not(any(feature = "cuda", feature = "vulkan", feature = "metal", target_os = "macos")))]
#[path = "no_gpu.rs"]
mod gpu;
mod kv;
mod load;
mod reply;
mod texts;
mod ui;

use args::{Cli, Command};
use clap::Parser;
use std::process::ExitCode;

/// Any error ends here; each names its culprit and what to do.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        None => commands::chat::run(&cli.chat),
        Some(Command::Inspect(args)) => commands::inspect::run(&args),
        Some(Command::Serve(args)) => commands::serve::run(&args),
        Some(Command::Agents(args)) => commands::agents::run(&args),
        Some(Command::Bench(args)) => commands::bench::run(&args),
        Some(Command::Doctor(args)) => commands::doctor::run(&args),
        Some(Command::Eval(args)) => commands::eval::run(&args),
        Some(Command::Quantize(args)) => commands::quantize::run(&args),
        Some(Command::Imatrix(args)) => commands::imatrix::run(&args),
        Some(Command::Perplexity(args)) => commands::perplexity::run(&args),
        Some(Command::Compare(args)) => commands::compare::run(&args),
        Some(Command::Cache(args)) => commands::cache::run(&args),
        Some(Command::Tokenize(args)) => commands::tokenize::run(&args),
        Some(Command::Render(args)) => commands::render::run(&args),
        Some(Command::Parse(args)) => commands::parse::run(&args),
        Some(Command::Logits(args)) => commands::logits::run(&args),
        Some(Command::Diff(args)) => commands::diff::run(&args),
    };
    match done {
        Ok(code) => code,
        // Somebody closed the pipe: not an error worth a message.
        Err(e) if is_broken_pipe(e.as_ref()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ds4: {e}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(e: &(dyn std::error::Error + 'static)) -> bool {
    e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
