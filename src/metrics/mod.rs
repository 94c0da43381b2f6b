//! Where measurements go.

pub mod event;
pub mod jsonl;
pub mod tensorboard;

use std::path::Path;

use anyhow::Result;

use self::event::Event;
use self::jsonl::JsonLines;
use self::tensorboard::EventFile;

/// Everywhere that a run's measurements go.
#[derive(Debug)]
pub struct Metrics {
    lines: JsonLines,
    tensorboard: Option<EventFile>,
}

impl Metrics {
    /// Opens a run's files to go on after `step`: lines, and event files in a folder where they are wanted.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn open(lines: &Path, tensorboard: Option<&Path>, step: u64) -> Result<Self> {
        let lines = JsonLines::after(lines, step)?;
        let tensorboard = tensorboard.map(|folder| EventFile::after(folder, step)).transpose()?;
        Ok(Self { lines, tensorboard })
    }

    /// Tells an event everywhere.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        self.lines.record(event)?;
        self.tensorboard.as_mut().map_or(Ok(()), |file| file.record(event))
    }
}
