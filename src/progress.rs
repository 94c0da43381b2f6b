//! Progress of long work: a bar with rate and time left on a terminal, nothing elsewhere.

use std::fmt;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Set once by `main` from `--quiet`; a verbosity switch, read by nothing that computes.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Silences progress and notes for the rest of the process.
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Whether `--quiet` was given.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Prints one line of talk on stderr, unless `--quiet`.
pub fn note(text: impl AsRef<str>) {
    if !is_quiet() {
        tell(format_args!("{}\n", text.as_ref()));
    }
}

/// Prints to stderr as it stands. That nobody listens, or that a disk is full of talk, ends no work.
pub fn tell(text: impl fmt::Display) {
    let _ = write!(std::io::stderr().lock(), "{text}");
}

/// A bar over `total` items named `unit`, hidden when quiet or when stderr is no terminal.
pub fn bar(total: u64, label: &str, unit: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), target());
    let template =
        format!("{{prefix:<12}} {{wide_bar}} {{pos}}/{{len}} {unit}  {{per_sec}}  {{eta}} left  {{msg}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.set_prefix(label.to_string());
    bar
}

/// A bar over bytes, as [`bar`].
pub fn bytes(total: u64, label: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), target());
    let template = "{prefix:<12} {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left  {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(label.to_string());
    bar
}

fn target() -> ProgressDrawTarget {
    if is_quiet() {
        ProgressDrawTarget::hidden()
    } else {
        // Hides itself when stderr is not a terminal.
        ProgressDrawTarget::stderr()
    }
}
