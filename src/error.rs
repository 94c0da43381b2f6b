//! How errors are told: `error:`, the cause chain, then `hint:`.
//!
//! Stages use `anyhow` with context; `thiserror` enums appear only where a caller branches.
//! A message is lower case, has no final period, puts literals in backticks and names the file.

use std::fmt::{self, Write as _};

/// The lead of a hint. `anyhow` hides a context's type once another wraps it, so hints are known by their text.
const HINT: &str = "hint: ";

/// What the reader should try next, attached to an error as a context.
#[derive(Debug)]
struct Hint {
    text: String,
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{HINT}{}", self.text)
    }
}

/// Adds a `hint:` line to an error.
pub trait HintExt<T> {
    /// Attaches the next step, in the imperative: `hint: set …`.
    fn hint(self, text: impl Into<String>) -> anyhow::Result<T>;

    /// As [`HintExt::hint`], with the text made only when there is an error.
    fn with_hint(self, text: impl FnOnce() -> String) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> HintExt<T> for Result<T, E> {
    fn hint(self, text: impl Into<String>) -> anyhow::Result<T> {
        self.with_hint(|| text.into())
    }

    fn with_hint(self, text: impl FnOnce() -> String) -> anyhow::Result<T> {
        self.map_err(|error| with_hint(error, text()))
    }
}

/// Builds an error from a message and the step that mends it.
pub fn user_error(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    anyhow::anyhow!(message.into()).context(Hint { text: hint.into() })
}

/// Adds a `hint:` line to an error at hand.
pub fn with_hint(error: impl Into<anyhow::Error>, text: impl Into<String>) -> anyhow::Error {
    error.into().context(Hint { text: text.into() })
}

/// Whether an error comes of a file that is not there.
pub fn is_missing_file(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    causes.any(|cause| cause.kind() == std::io::ErrorKind::NotFound)
}

/// Renders an error the way the program prints it on stderr.
///
/// Hints may sit anywhere in the chain; they are printed last, the outermost first.
pub fn render(error: &anyhow::Error) -> String {
    let (hints, causes): (Vec<String>, Vec<String>) =
        error.chain().map(ToString::to_string).partition(|line| line.starts_with(HINT));
    let mut text = String::new();
    for (depth, cause) in causes.iter().enumerate() {
        let lead = if depth == 0 { "error: " } else { "  caused by: " };
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{lead}{cause}");
    }
    for hint in hints {
        let _ = writeln!(text, "{hint}");
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::{HintExt as _, render, user_error};

    #[test]
    fn hints_come_last_whatever_wraps_them() {
        let failure: anyhow::Result<()> = Err(user_error("a is 3, expected 4", "set a to 4"));
        let failure = failure.context("cannot read `x`").hint("look again");
        let text = render(&failure.expect_err("it fails"));
        assert_eq!(
            text,
            "error: cannot read `x`\n  caused by: a is 3, expected 4\nhint: look again\nhint: set a to 4\n"
        );
    }
}
