//! A command's answer, on stdout: data alone, for people or for scripts.

use std::io::{self, ErrorKind, Write};

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Prints a text, and a line break where it does not end with one. That a reader has what it wants, as in
/// `granite runs list | head -1`, ends no work and is no error.
///
/// # Errors
/// When it cannot be written, as to a file on a full disk.
pub fn text(text: &str) -> Result<()> {
    write(&mut io::stdout().lock(), text).context("cannot write to stdout")
}

/// Prints a value as JSON for people and scripts, as [`text`].
///
/// # Errors
/// As [`text`].
pub fn json(value: &impl Serialize) -> Result<()> {
    text(&serde_json::to_string_pretty(value)?)
}

fn write(to: &mut impl Write, text: &str) -> io::Result<()> {
    let end = if text.ends_with('\n') { "" } else { "\n" };
    let written = write!(to, "{text}{end}").and_then(|()| to.flush());
    written.or_else(|error| if error.kind() == ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    /// Fails in this way.
    struct Failing(ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_break_at_the_end_and_no_error_where_nobody_reads() {
        let mut written = Vec::new();
        write(&mut written, "a").unwrap();
        write(&mut written, "b\n").unwrap();
        assert_eq!(written, b"a\nb\n");
        write(&mut Failing(ErrorKind::BrokenPipe), "a").unwrap();
        assert_eq!(
            write(&mut Failing(ErrorKind::StorageFull), "a").unwrap_err().kind(),
            ErrorKind::StorageFull
        );
    }
}
