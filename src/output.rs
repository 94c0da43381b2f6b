//! Outputs appear by rename, whole or not at all.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// How the names of unfinished folders begin.
const INCOMPLETE: &str = ".incomplete-";
/// How the names of folders begin that hold what is being replaced.
const REPLACED: &str = ".replaced-";

/// Removes what processes that were killed left unfinished in a folder. No other may be writing there.
///
/// # Errors
/// When the folder cannot be read or one cannot be removed.
pub fn sweep(folder: &Path) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(INCOMPLETE) || name.starts_with(REPLACED) {
            let path = entry.path();
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove `{}`", path.display()))?;
        }
    }
    Ok(())
}

/// A folder that is written under a temporary name beside its destination and appears on [`commit`](Staged::commit).
///
/// Dropped without `commit`, it leaves nothing behind.
#[derive(Debug)]
pub struct Staged {
    temporary: tempfile::TempDir,
    destination: PathBuf,
}

impl Staged {
    /// Begins a folder that will become `destination`.
    ///
    /// # Errors
    /// When the parent folder cannot be made or written.
    pub fn folder(destination: &Path) -> Result<Self> {
        let parent = parent_of(destination);
        fs::create_dir_all(&parent)
            .with_context(|| format!("cannot create folder `{}`", parent.display()))?;
        let temporary = tempfile::Builder::new()
            .prefix(INCOMPLETE)
            .tempdir_in(&parent)
            .with_context(|| format!("cannot write in folder `{}`", parent.display()))?;
        Ok(Self { temporary, destination: destination.to_path_buf() })
    }

    /// Where to write the files meanwhile.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Puts the folder in its place; an existing one is replaced, and comes back if that fails.
    ///
    /// # Errors
    /// When a rename fails; the destination is then as it was.
    pub fn commit(self) -> Result<()> {
        sync_tree(self.temporary.path())?;
        let parent = parent_of(&self.destination);
        let old = tempfile::Builder::new().prefix(REPLACED).tempdir_in(&parent)?;
        let had_old = self.destination.exists();
        let aside = old.path().join("old");
        if had_old {
            fs::rename(&self.destination, &aside)
                .with_context(|| format!("cannot replace `{}`", self.destination.display()))?;
        }
        let temporary = self.temporary.keep();
        if let Err(error) = fs::rename(&temporary, &self.destination) {
            if had_old {
                fs::rename(&aside, &self.destination)?;
            }
            fs::remove_dir_all(&temporary).ok();
            return Err(error).with_context(|| format!("cannot write `{}`", self.destination.display()));
        }
        sync_folder(&parent)
    }
}

/// Writes a file whole or not at all.
///
/// # Errors
/// When the folder cannot be made or the file cannot be written; an existing file is then untouched.
pub fn write_file(destination: &Path, contents: &[u8]) -> Result<()> {
    let parent = parent_of(destination);
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(&parent)?;
        let mut file = tempfile::NamedTempFile::new_in(&parent)?;
        file.write_all(contents)?;
        file.as_file().sync_all()?;
        file.persist(destination).map_err(|error| error.error)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write `{}`", destination.display()))
}

fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// A rename may reach the disk before the data it names, so the data is flushed first.
fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            fs::File::open(&path)?.sync_all()?;
        }
    }
    sync_folder(folder)
}

fn sync_folder(folder: &Path) -> Result<()> {
    fs::File::open(folder)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let destination = root.path().join("deep/run");
        let staged = Staged::folder(&destination).unwrap();
        fs::write(staged.path().join("a"), "1").unwrap();
        assert!(!destination.exists());
        drop(staged);
        assert_eq!(fs::read_dir(root.path().join("deep")).unwrap().count(), 0, "nothing stays behind");

        let staged = Staged::folder(&destination).unwrap();
        fs::write(staged.path().join("a"), "1").unwrap();
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(destination.join("a")).unwrap(), "1");
    }

    #[test]
    fn a_folder_replaces_its_predecessor_wholly() {
        let root = tempfile::tempdir().unwrap();
        let destination = root.path().join("run");
        for name in ["old", "new"] {
            let staged = Staged::folder(&destination).unwrap();
            fs::write(staged.path().join(name), name).unwrap();
            staged.commit().unwrap();
        }
        assert!(!destination.join("old").exists());
        assert!(destination.join("new").exists());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "the predecessor is gone");
    }

    #[test]
    fn what_a_killed_process_left_is_swept_away() {
        let root = tempfile::tempdir().unwrap();
        for name in [".incomplete-a1", ".replaced-b2", "step-000002"] {
            fs::create_dir_all(root.path().join(name).join("inside")).unwrap();
        }
        sweep(root.path()).unwrap();
        let left: Vec<_> =
            fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["step-000002"]);
    }

    #[test]
    fn a_file_that_cannot_be_written_names_itself() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "x").unwrap();
        let error = write_file(&root.path().join("file/inside"), b"y").unwrap_err();
        assert!(format!("{error:#}").contains("file/inside"), "{error:#}");
    }
}
