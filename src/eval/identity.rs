//! What a folder of results was measured on. Results of anything else are never put beside them.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::checkpoint::run::RunFolder;
use crate::error::{HintExt as _, user_error};
use crate::output;

const FILE: &str = "evaluation.json";
const LOCK: &str = ".lock";

/// The choices that decide an evaluation's numbers, by name.
#[derive(Debug)]
pub struct Identity {
    path: PathBuf,
    /// Held locked: two processes would write into each other's results.
    _lock: File,
    known: BTreeMap<String, String>,
}

impl Identity {
    /// Of a folder, which is made where it is missing; a new one has none yet.
    ///
    /// # Errors
    /// When the folder cannot be used, another process is measuring into it, or the file is damaged.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        if !path.exists() && RunFolder::at(folder).is_begun() {
            return Err(user_error(
                format!("`{}` holds a run, whose report would be replaced", folder.display()),
                "name a folder of its own with `--out`, within the run's if you like",
            ));
        }
        let lock = locked(folder)?;
        let known = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("cannot read `{}`", path.display()))
                .hint("name another folder with `--out`")?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| format!("cannot read `{}`", path.display())),
        };
        Ok(Self { path, _lock: lock, known })
    }

    /// Whether anything was measured here before.
    pub fn is_new(&self) -> bool {
        self.known.is_empty()
    }

    /// Claims that these are the choices of this folder; those it does not know yet are written down.
    ///
    /// # Errors
    /// When one of them is another, with both values.
    pub fn claim(&mut self, choices: &[(String, String)]) -> Result<()> {
        for (name, value) in choices {
            if let Some(known) = self.known.get(name).filter(|known| *known != value) {
                return Err(self.refusal(name, known, value));
            }
        }
        let before = self.known.len();
        self.known.extend(choices.iter().cloned());
        if self.known.len() == before {
            return Ok(());
        }
        let mut text = serde_json::to_vec_pretty(&self.known)?;
        text.push(b'\n');
        output::write_file(&self.path, &text)
    }

    fn refusal(&self, name: &str, known: &str, value: &str) -> anyhow::Error {
        let folder = self.path.parent().unwrap_or(&self.path);
        user_error(
            format!(
                "`{}` holds an evaluation whose {name} is `{known}`, this one's is `{value}`",
                folder.display()
            ),
            "name another folder with `--out`, or remove this one to measure again",
        )
    }
}

fn locked(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let in_file = || format!("cannot use `{}`", path.display());
    std::fs::create_dir_all(folder).with_context(in_file)?;
    let file = File::create(&path).with_context(in_file)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(user_error(
            format!("another process is measuring into `{}`", folder.display()),
            "wait for its end, or name another folder with `--out`",
        )),
        Err(TryLockError::Error(error)) => Err(error).with_context(in_file),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    #[test]
    fn another_choice_is_refused_with_both_values() {
        let folder = tempfile::tempdir().unwrap();
        let choice = |value: &str| [("dataset".to_string(), value.to_string())];
        let mut identity = Identity::open(folder.path()).unwrap();
        assert!(identity.is_new());
        identity.claim(&choice("one")).unwrap();
        identity.claim(&[("model base".to_string(), "x".to_string())]).unwrap();
        let text = crate::error::render(&Identity::open(folder.path()).unwrap_err());
        assert!(text.contains("another process"), "{text}");
        drop(identity);
        let mut again = Identity::open(folder.path()).unwrap();
        assert!(!again.is_new());
        again.claim(&choice("one")).unwrap();
        let text = crate::error::render(&again.claim(&choice("two")).unwrap_err());
        assert!(text.contains("whose dataset is `one`, this one's is `two`"), "{text}");
        again.claim(&choice("one")).unwrap();
    }
}
