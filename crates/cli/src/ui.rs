//! What the person sees on stderr, and only where it is a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// A line about what is going on.
pub(crate) fn note(text: &str) {
    eprintln!("{}", dim(text, std::io::stderr().is_terminal()));
}

/// A line of results.
pub(crate) fn print_line(line: std::fmt::Arguments<'_>) {
    match writeln!(std::io::stdout(), "{line}") {
        Ok(()) => {}
        // Whoever read the results has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => {
            eprintln!("ds4: standard output: {e}");
            std::process::exit(1);
        }
    }
}

/// `text` dimmed for a terminal.
pub(crate) fn dim(text: &str, terminal: bool) -> String {
    if terminal { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
}

/// A bar that shows nothing where nobody watches.
fn bar(len: Option<u64>) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    ProgressBar::with_draw_target(len, target)
}

/// The same in a style.
fn styled(len: u64, template: &str) -> ProgressBar {
    let bar = bar(Some(len));
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Something of unknown length.
pub(crate) fn spinner(what: &'static str) -> ProgressBar {
    let spinner = bar(None).with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Progress over the bytes of a model.
pub(crate) fn loading(total: u64) -> ProgressBar {
    let bar = styled(total, "loading {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left");
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Progress over things that have names.
pub(crate) fn items(what: &str) -> ProgressBar {
    styled(0, &format!("{{bar:30}} {{pos}}/{{len}} {what}, {{eta}} left: {{msg}}"))
}

/// Progress over weights that are encoded.
pub(crate) fn weights(total: u64) -> ProgressBar {
    styled(total, "{bar:30} {percent}% of the weights, {per_sec}, {eta} left: {msg}")
}

/// Progress over tokens.
pub(crate) fn tokens(what: &'static str, total: usize) -> ProgressBar {
    styled(total as u64, "{msg} {bar:30} {pos}/{len} tokens, {per_sec}, {eta} left").with_message(what)
}

/// A number of bytes for people.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [(&str, f64); 3] = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    match UNITS.iter().find(|(_, size)| n as f64 >= *size) {
        Some((unit, size)) => format!("{:.2} {unit}", n as f64 / size),
        None => format!("{n} B"),
    }
}
