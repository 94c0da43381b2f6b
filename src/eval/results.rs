//! Results as they become known: one JSON object a line, so that an interrupted evaluation goes on where it was.
//! They may become known in any order, and are put into the one they are read in at the end.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::HintExt as _;
use crate::output;

/// A file of results, and what was in it when it was opened.
#[derive(Debug)]
pub struct Results<T> {
    path: PathBuf,
    file: File,
    all: Vec<T>,
}

impl<T: Serialize + DeserializeOwned> Results<T> {
    /// Opens a file, or begins it. A last line without an end is what a killed process left, and is cut off.
    ///
    /// # Errors
    /// When the file cannot be read or written, or a line is no result.
    pub fn open(path: &Path) -> Result<Self> {
        let in_file = || format!("cannot use `{}`", path.display());
        let mut file = open(path)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).with_context(in_file)?;
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).with_context(in_file)?;
        file.seek(SeekFrom::End(0)).with_context(in_file)?;
        let lines = text[..whole].split_inclusive(|byte| *byte == b'\n').enumerate();
        let parsed = lines.map(|(at, line)| {
            serde_json::from_slice(line)
                .with_context(|| format!("line {} of `{}` is no result", at + 1, path.display()))
                .hint("remove the file to measure this part again")
        });
        let all = parsed.collect::<Result<Vec<T>>>()?;
        Ok(Self { path: path.to_path_buf(), file, all })
    }

    /// The results so far.
    pub fn all(&self) -> &[T] {
        &self.all
    }

    /// Adds a result; it is in the file when this comes back.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn push(&mut self, result: T) -> Result<()> {
        self.file
            .write_all(&line(&result)?)
            .with_context(|| format!("cannot write `{}`", self.path.display()))?;
        self.all.push(result);
        Ok(())
    }

    /// Puts the results into ascending order of `place`, here and in the file; results of one place stay as they are.
    ///
    /// # Errors
    /// When the file cannot be written; it then holds the results as before.
    pub fn sort_by_key(&mut self, place: impl Fn(&T) -> usize) -> Result<()> {
        if self.all.is_sorted_by_key(&place) {
            return Ok(());
        }
        self.all.sort_by_key(place);
        let lines = self.all.iter().map(line).collect::<Result<Vec<_>>>()?;
        output::write_file(&self.path, &lines.concat())?;
        self.file = open(&self.path)?;
        self.file.seek(SeekFrom::End(0)).with_context(|| format!("cannot use `{}`", self.path.display()))?;
        Ok(())
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(path).with_context(|| format!("cannot use `{}`", path.display()))
}

fn line(result: &impl Serialize) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(result)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_is_cut_off_and_the_rest_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let mut results = Results::<Vec<f64>>::open(&path).unwrap();
        for at in 0..3 {
            results.push(vec![f64::from(at), 0.1 + 0.2]).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        for kept in [whole.len() - 1, whole.len() - 5] {
            std::fs::write(&path, &whole[..kept]).unwrap();
            let mut results = Results::<Vec<f64>>::open(&path).unwrap();
            assert_eq!(results.all(), [[0.0, 0.1 + 0.2], [1.0, 0.1 + 0.2]]);
            results.push(vec![2.0, 0.1 + 0.2]).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
        std::fs::write(&path, "torn").unwrap();
        assert!(Results::<Vec<f64>>::open(&path).unwrap().all().is_empty());
    }

    #[test]
    fn sorted_results_lie_sorted_in_the_file_and_go_on_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let mut results = Results::<(usize, char)>::open(&path).unwrap();
        for result in [(2, 'a'), (0, 'b'), (2, 'c'), (1, 'd')] {
            results.push(result).unwrap();
        }
        results.sort_by_key(|(place, _)| *place).unwrap();
        let sorted = [(0, 'b'), (1, 'd'), (2, 'a'), (2, 'c')];
        assert_eq!(results.all(), sorted);
        assert_eq!(Results::<(usize, char)>::open(&path).unwrap().all(), sorted);
        results.push((1, 'e')).unwrap();
        assert_eq!(Results::<(usize, char)>::open(&path).unwrap().all(), results.all());
        assert_eq!(results.all().len(), 5);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_line_that_is_no_result_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, "[1]\n{}\n[2]\n").unwrap();
        let text = crate::error::render(&Results::<Vec<f64>>::open(&path).unwrap_err());
        assert!(text.contains("line 2 of") && text.contains("a.jsonl") && text.contains("hint: "), "{text}");
    }
}
