//! Event files that TensorBoard reads.
//!
//! A file is a chain of records: the length as u64, its checksum, the bytes, their checksum; checksums are CRC-32C,
//! rotated right by 15 and moved by a constant (TensorFlow, `tensorflow/core/lib/io/record_writer.h`). The bytes are an
//! `Event` message (`tensorflow/core/util/event.proto`), written here field by field.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use super::event::Event;

/// An open event file.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

/// Fields of `Event`, with the way they are written: varint 0, eight bytes 1, length and bytes 2, four bytes 5.
const WALL_TIME: u8 = 1 << 3 | 1;
const STEP: u8 = 2 << 3;
const FILE_VERSION: u8 = 3 << 3 | 2;
const SUMMARY: u8 = 5 << 3 | 2;
const SESSION_LOG: u8 = 7 << 3 | 2;

/// Fields of `Summary` and `Summary.Value`.
const VALUE: u8 = 1 << 3 | 2;
const TAG: u8 = 1 << 3 | 2;
const SIMPLE_VALUE: u8 = 2 << 3 | 5;

/// `SessionLog` with the status START: a reader forgets what it knows of this step and of later ones.
const SESSION_START: [u8; 2] = [1 << 3, 1];

impl EventFile {
    /// A new file in `folder`; what earlier files say of steps after `step` is taken back.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn after(folder: &Path, step: u64) -> Result<Self> {
        let in_folder = || format!("cannot use folder `{}`", folder.display());
        fs::create_dir_all(folder).with_context(in_folder)?;
        // A run that began again from nothing takes back all of them.
        let takes_back = step > 0 || fs::read_dir(folder).with_context(in_folder)?.next().is_some();
        // Readers take files in the order of their names, and only those with this beginning.
        let stamp = now() as u64;
        let mut number = 0;
        let (path, file) = loop {
            let path = folder.join(format!("events.out.tfevents.{stamp:010}.granite.{number}"));
            match File::create_new(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot write `{}`", path.display()));
                }
            }
        };
        let mut events = Self { path, file };
        events.write(&message(0, |to| bytes(to, FILE_VERSION, b"brain.Event:2")))?;
        if takes_back {
            events.write(&message(step + 1, |to| bytes(to, SESSION_LOG, &SESSION_START)))?;
        }
        Ok(events)
    }

    /// Appends an event's numbers.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        let summary = scalars(event).into_iter().fold(Vec::new(), |mut summary, (tag, number)| {
            let mut value = Vec::new();
            bytes(&mut value, TAG, tag.as_bytes());
            value.push(SIMPLE_VALUE);
            value.extend((number as f32).to_le_bytes());
            bytes(&mut summary, VALUE, &value);
            summary
        });
        self.write(&message(event.step(), |to| bytes(to, SUMMARY, &summary)))
    }

    fn write(&mut self, message: &[u8]) -> Result<()> {
        let length = (message.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(message.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(message);
        record.extend(masked_crc(message).to_le_bytes());
        self.file.write_all(&record).with_context(|| format!("cannot write `{}`", self.path.display()))
    }
}

/// What is drawn of an event.
fn scalars(event: &Event) -> Vec<(String, f64)> {
    let named = |name: &str, number: f64| (name.to_string(), number);
    match event {
        Event::Step(step) => vec![
            named("train/loss", step.loss),
            named("train/learning_rate", step.lr),
            named("train/grad_norm", step.grad_norm),
            named("train/tokens_per_second", step.tokens as f64 / step.seconds),
            named("train/epoch", step.epoch),
        ],
        Event::Validation { loss, perplexity, sources, .. } => {
            let sources = sources.iter().map(|(name, loss)| (format!("validation/loss/{name}"), *loss));
            [named("validation/loss", *loss), named("validation/perplexity", *perplexity)]
                .into_iter()
                .chain(sources)
                .collect()
        }
        Event::Epoch { loss, .. } => vec![named("train/epoch_loss", *loss)],
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

fn message(step: u64, content: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut message = vec![WALL_TIME];
    message.extend(now().to_le_bytes());
    message.push(STEP);
    varint(&mut message, step);
    content(&mut message);
    message
}

fn bytes(to: &mut Vec<u8>, field: u8, content: &[u8]) {
    to.push(field);
    varint(to, content.len() as u64);
    to.extend(content);
}

/// Seven bits a byte, the lowest first.
fn varint(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with Castagnoli's polynomial, bits reversed.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    /// RFC 3720, appendix B.4.
    #[test]
    fn checksums_are_those_of_the_standard() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    /// The messages of a file, with their checksums checked.
    fn messages(path: &Path) -> Vec<Vec<u8>> {
        let mut rest = &fs::read(path).unwrap()[..];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(12);
            let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
            assert_eq!(masked_crc(&head[..8]).to_le_bytes(), head[8..]);
            assert_eq!(masked_crc(&tail[..length]).to_le_bytes(), tail[length..length + 4]);
            messages.push(tail[..length].to_vec());
            rest = &tail[length + 4..];
        }
        messages
    }

    #[test]
    fn a_run_that_goes_on_takes_later_steps_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = EventFile::after(folder.path(), 0).unwrap();
        first.record(&Event::Epoch { epoch: 1, step: 300, loss: 0.5 }).unwrap();
        let written = messages(&first.path);
        assert_eq!(written.len(), 2);
        assert!(written[0].ends_with(b"brain.Event:2"));
        // Time, step 300, a summary of one value: its tag and 0.5.
        let mut wanted = vec![STEP, 0xac, 0x02, SUMMARY, 25, VALUE, 23, TAG, 16];
        wanted.extend(b"train/epoch_loss");
        wanted.push(SIMPLE_VALUE);
        wanted.extend(0.5f32.to_le_bytes());
        assert_eq!(written[1][9..], wanted);

        let second = EventFile::after(folder.path(), 200).unwrap();
        assert!(second.path > first.path);
        let written = messages(&second.path);
        assert_eq!(written[1][9..], [STEP, 0xc9, 0x01, SESSION_LOG, 2, 8, 1]);
        // Begun again before its first checkpoint.
        let third = EventFile::after(folder.path(), 0).unwrap();
        assert_eq!(messages(&third.path)[1][9..], [STEP, 1, SESSION_LOG, 2, 8, 1]);
    }
}
