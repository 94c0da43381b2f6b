//! `metrics.jsonl`: one event a line, flushed as it happens.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::event::Event;
use crate::output;

/// An open `metrics.jsonl`.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens the file to go on after `step`: events of later steps, left by a run that went further than its
    /// last checkpoint, are taken out, so that no step stands there twice.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn after(path: &Path, step: u64) -> Result<Self> {
        let kept: String = read(path)?
            .iter()
            .filter(|event| event.step() <= step)
            .map(|event| serde_json::to_string(event).map(|line| line + "\n"))
            .collect::<Result<_, _>>()?;
        output::write_file(path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.with_context(|| format!("cannot write `{}`", path.display()))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends an event.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        let line = serde_json::to_string(event)? + "\n";
        self.file
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write `{}`", self.path.display()))
    }
}

/// Reads the events of a file; none when there is no file. A last line cut off by a crash is no event.
///
/// # Errors
/// When the file cannot be read or another line is no event.
pub fn read(path: &Path) -> Result<Vec<Event>> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read `{}`", path.display()))?,
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(index, line)| {
            serde_json::from_str(line)
                .with_context(|| format!("`{}`: line {} is no event", path.display(), index + 1))
        })
        .collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
mod tests {
    use super::*;

    #[test]
    fn going_on_takes_out_later_steps_and_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut lines = JsonLines::after(&path, 0).unwrap();
        for step in 1..=3 {
            lines.record(&Event::Epoch { epoch: step, step, loss: 0.5 }).unwrap();
        }
        lines.file.write_all(b"{\"event\":\"epo").unwrap();
        JsonLines::after(&path, 2).unwrap();
        let steps: Vec<u64> = read(&path).unwrap().iter().map(Event::step).collect();
        assert_eq!(steps, [1, 2]);
    }
}
