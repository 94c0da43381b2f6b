//! Outputs appear by rename, whole or not at all.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::error::user_error;

/// How the names of unfinished files and folders begin, and of those that are being removed.
const INCOMPLETE: &str = ".granite-incomplete-";
/// How the names of folders begin that hold what is being replaced.
const REPLACED: &str = ".granite-replaced-";

/// Removes what processes that were killed left unfinished in a folder, or left to be removed; what a living one writes
/// there stays. A folder that was taken out of its place and never replaced goes back.
///
/// # Errors
/// When the folder cannot be read, or one cannot be removed.
pub fn sweep(folder: &Path) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let path = entry.path();
        if !(name.starts_with(INCOMPLETE) || name.starts_with(REPLACED)) {
            continue;
        }
        let remove = || -> std::io::Result<()> {
            // Held until it is gone, so that whoever made it this moment makes another.
            let Some(_claimed) = claimed(&path)? else { return Ok(()) };
            if !path.is_dir() {
                return fs::remove_file(&path);
            }
            if name.starts_with(REPLACED) {
                put_back(&path, folder)?;
            }
            fs::remove_dir_all(&path)
        };
        match remove() {
            // Another process swept it away.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => other.with_context(|| format!("cannot remove `{}`", path.display()))?,
        }
    }
    Ok(())
}

/// The lock of a file or folder, which ends with its process; `None` while another process holds it.
fn claimed(path: &Path) -> std::io::Result<Option<fs::File>> {
    let file = fs::File::open(path)?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        // A file system without locks: what cannot be told is taken for abandoned.
        Ok(()) | Err(fs::TryLockError::Error(_)) => Ok(Some(file)),
    }
}

/// Puts what lies in `aside` back into `folder`, where nothing stands in its place.
fn put_back(aside: &Path, folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(aside)? {
        let entry = entry?;
        let place = folder.join(entry.file_name());
        if !place.exists() {
            fs::rename(entry.path(), place)?;
        }
    }
    Ok(())
}

/// That nothing of the user's would be lost: the destination is not there, is an empty folder, or is a folder that holds
/// the files `marks`, which outputs of its kind have.
///
/// # Errors
/// When something else stands there.
pub fn ensure_replaceable(destination: &Path, marks: &[&str]) -> Result<()> {
    let Ok(found) = fs::symlink_metadata(destination) else { return Ok(()) };
    let is_empty = || fs::read_dir(destination).is_ok_and(|mut entries| entries.next().is_none());
    let lacks = marks.iter().find(|mark| !destination.join(mark).is_file());
    let what = match lacks {
        _ if !destination.is_dir() && found.is_symlink() => "is a link that leads nowhere".to_string(),
        _ if !destination.is_dir() => "is a file".to_string(),
        Some(mark) if !is_empty() => {
            format!("is there already and holds no `{mark}`: it is not ours to replace")
        }
        _ => return Ok(()),
    };
    Err(user_error(format!("`{}` {what}", destination.display()), "name another folder, or remove this one"))
}

/// A folder of a name of its own in `parent`, locked for as long as the file lives.
fn temporary(parent: &Path, prefix: &str) -> std::io::Result<(tempfile::TempDir, fs::File)> {
    loop {
        let folder = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?;
        let alive = fs::File::open(folder.path());
        // One that was swept away between the two lines is made again.
        match alive {
            Ok(alive) => {
                // Waits for one that is sweeping it away. Where there are no locks it is as safe as it can be.
                let _ = alive.lock();
                if folder.path().exists() {
                    return Ok((folder, alive));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// A file of a name of its own in `parent`, locked for as long as it is open, and readable for everybody whom the user's
/// mask lets read: a temporary file is its user's alone otherwise.
fn temporary_file(parent: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mode = fs::Permissions::from_mode(0o666);
    loop {
        let file =
            tempfile::Builder::new().prefix(INCOMPLETE).permissions(mode.clone()).tempfile_in(parent)?;
        let _ = file.as_file().lock();
        if file.path().exists() {
            return Ok(file);
        }
    }
}

/// Removes a folder of ours. It leaves its place at once and whole; what is left of it when the process is killed
/// meanwhile is [swept](sweep) away.
///
/// # Errors
/// When it cannot be removed.
pub fn remove_folder(folder: &Path) -> Result<()> {
    let remove = || -> std::io::Result<()> {
        let (aside, _alive) = temporary(&parent_of(folder), INCOMPLETE)?;
        fs::rename(folder, aside.path().join(folder.file_name().unwrap_or_default()))?;
        aside.close()
    };
    remove().with_context(|| format!("cannot remove `{}`", folder.display()))
}

/// A folder that is written under a temporary name beside its destination and appears on [`commit`](Staged::commit).
///
/// Dropped without `commit`, it leaves nothing behind.
#[derive(Debug)]
pub struct Staged {
    temporary: tempfile::TempDir,
    /// Locked: who [sweeps](sweep) leaves it alone while this process lives.
    _alive: fs::File,
    destination: PathBuf,
}

impl Staged {
    /// Begins a folder that will become `destination`; one that is there already will be replaced if it is
    /// [replaceable](ensure_replaceable) by its `marks`. What killed processes left beside it is removed.
    ///
    /// # Errors
    /// When something else stands there, or the parent folder cannot be made or written.
    pub fn folder(destination: &Path, marks: &[&str]) -> Result<Self> {
        ensure_replaceable(destination, marks)?;
        // Through a link: what it points to is replaced, not the link.
        let destination = &fs::canonicalize(destination).unwrap_or_else(|_| destination.to_path_buf());
        let parent = parent_of(destination);
        fs::create_dir_all(&parent)
            .with_context(|| format!("cannot create folder `{}`", parent.display()))?;
        // What cannot be tidied up is in nobody's way.
        let _ = sweep(&parent);
        let (temporary, alive) = temporary(&parent, INCOMPLETE)
            .with_context(|| format!("cannot write in folder `{}`", parent.display()))?;
        Ok(Self { temporary, _alive: alive, destination: destination.to_path_buf() })
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
        let in_place = || format!("cannot write `{}`", self.destination.display());
        if !self.destination.exists() {
            let temporary = self.temporary.keep();
            if let Err(error) = fs::rename(&temporary, &self.destination) {
                fs::remove_dir_all(&temporary).ok();
                return Err(error).with_context(in_place);
            }
        } else if exchange(self.temporary.path(), &self.destination).is_err() {
            replace(self.temporary, &self.destination, &parent).with_context(in_place)?;
        }
        // After an exchange the predecessor has the temporary name, and goes with it.
        sync_folder(&parent)
    }
}

/// Two folders change places at once: there is no moment without either. Not every file system can.
#[cfg(target_os = "linux")]
fn exchange(one: &Path, other: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

#[cfg(not(target_os = "linux"))]
fn exchange(_one: &Path, _other: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Replaces a folder in two steps. When the process dies between them, [`sweep`] puts the old one back.
fn replace(temporary: tempfile::TempDir, destination: &Path, parent: &Path) -> std::io::Result<()> {
    let (old, _alive) = self::temporary(parent, REPLACED)?;
    let aside = old.path().join(destination.file_name().unwrap_or_default());
    fs::rename(destination, &aside)?;
    let temporary = temporary.keep();
    if let Err(error) = fs::rename(&temporary, destination) {
        fs::rename(&aside, destination)?;
        fs::remove_dir_all(&temporary).ok();
        return Err(error);
    }
    Ok(())
}

/// Writes a file whole or not at all.
///
/// # Errors
/// When the folder cannot be made or the file cannot be written; an existing file is then untouched.
pub fn write_file(destination: &Path, contents: &[u8]) -> Result<()> {
    let parent = parent_of(destination);
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(&parent)?;
        let mut file = temporary_file(&parent)?;
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
        let staged = Staged::folder(&destination, &[]).unwrap();
        fs::write(staged.path().join("a"), "1").unwrap();
        assert!(!destination.exists());
        drop(staged);
        assert_eq!(fs::read_dir(root.path().join("deep")).unwrap().count(), 0, "nothing stays behind");

        let staged = Staged::folder(&destination, &[]).unwrap();
        fs::write(staged.path().join("a"), "1").unwrap();
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(destination.join("a")).unwrap(), "1");
    }

    #[test]
    fn a_folder_replaces_its_predecessor_wholly() {
        let root = tempfile::tempdir().unwrap();
        let destination = root.path().join("run");
        for name in ["old", "new"] {
            let staged = Staged::folder(&destination, &[]).unwrap();
            fs::write(staged.path().join(name), name).unwrap();
            staged.commit().unwrap();
        }
        assert!(!destination.join("old").exists());
        assert!(destination.join("new").exists());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "the predecessor is gone");
    }

    fn names(folder: &Path) -> Vec<String> {
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = fs::read_dir(folder).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_not_ours_is_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        let told = |name: &str| {
            crate::error::render(&Staged::folder(&root.path().join(name), &["mark"]).unwrap_err())
        };
        fs::create_dir(root.path().join("thesis")).unwrap();
        fs::write(root.path().join("thesis/text"), "").unwrap();
        assert!(
            told("thesis").contains("thesis` is there already and holds no `mark`"),
            "{}",
            told("thesis")
        );
        fs::write(root.path().join("file"), "").unwrap();
        assert!(told("file").contains("is a file"));
        std::os::unix::fs::symlink("nowhere", root.path().join("dangling")).unwrap();
        assert!(told("dangling").contains("leads nowhere"));
        fs::create_dir(root.path().join("empty")).unwrap();
        drop(Staged::folder(&root.path().join("empty"), &["mark"]).unwrap());
        fs::write(root.path().join("thesis/mark"), "").unwrap();
        std::os::unix::fs::symlink("thesis", root.path().join("link")).unwrap();
        let staged = Staged::folder(&root.path().join("link"), &["mark"]).unwrap();
        fs::write(staged.path().join("new"), "").unwrap();
        staged.commit().unwrap();
        assert_eq!(names(&root.path().join("thesis")), ["new"]);
        assert!(root.path().join("link").is_symlink());
    }

    #[test]
    fn what_a_killed_process_left_is_swept_away() {
        let root = tempfile::tempdir().unwrap();
        for name in [format!("{INCOMPLETE}a1"), format!("{REPLACED}b2"), "step-000002".to_string()] {
            fs::create_dir_all(root.path().join(name).join("inside")).unwrap();
        }
        fs::create_dir(root.path().join("inside")).unwrap();
        sweep(root.path()).unwrap();
        assert_eq!(names(root.path()), ["inside", "step-000002"]);
        fs::create_dir_all(root.path().join(format!("{INCOMPLETE}c3"))).unwrap();
        fs::write(root.path().join(format!("{INCOMPLETE}d4")), "half").unwrap();
        drop(Staged::folder(&root.path().join("next"), &[]).unwrap());
        assert_eq!(names(root.path()), ["inside", "step-000002"], "whoever writes there next sweeps too");
    }

    #[test]
    fn what_a_living_process_writes_stays() {
        let root = tempfile::tempdir().unwrap();
        let staged = Staged::folder(&root.path().join("merged"), &[]).unwrap();
        fs::write(staged.path().join("a"), "1").unwrap();
        let file = temporary_file(root.path()).unwrap();
        sweep(root.path()).unwrap();
        drop(Staged::folder(&root.path().join("step-000002"), &[]).unwrap());
        assert!(file.path().exists());
        staged.commit().unwrap();
        assert_eq!(names(&root.path().join("merged")), ["a"]);
    }

    #[test]
    fn a_folder_is_removed_with_all_that_is_in_it() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("step-000002/inside")).unwrap();
        remove_folder(&root.path().join("step-000002")).unwrap();
        assert_eq!(names(root.path()), Vec::<String>::new());
        let told = format!("{:#}", remove_folder(&root.path().join("step-000002")).unwrap_err());
        assert!(told.contains("cannot remove") && told.contains("step-000002"), "{told}");
        assert_eq!(names(root.path()), Vec::<String>::new());
    }

    #[test]
    fn a_folder_that_was_taken_out_and_not_replaced_goes_back() {
        let root = tempfile::tempdir().unwrap();
        let aside = root.path().join(format!("{REPLACED}x/merged"));
        fs::create_dir_all(aside.join("weights")).unwrap();
        fs::create_dir_all(root.path().join(format!("{INCOMPLETE}y"))).unwrap();
        sweep(root.path()).unwrap();
        assert_eq!(names(root.path()), ["merged"]);
        assert_eq!(names(&root.path().join("merged")), ["weights"]);
    }

    #[test]
    fn a_folder_is_replaced_in_two_steps_where_it_must_be() {
        let root = tempfile::tempdir().unwrap();
        let destination = root.path().join("run");
        fs::create_dir_all(destination.join("old")).unwrap();
        let (new, _alive) = temporary(root.path(), INCOMPLETE).unwrap();
        fs::create_dir(new.path().join("new")).unwrap();
        replace(new, &destination, root.path()).unwrap();
        assert_eq!((names(root.path()), names(&destination)), (vec!["run".into()], vec!["new".into()]));
    }

    #[test]
    fn a_file_is_as_readable_as_the_user_s_mask_says() {
        let root = tempfile::tempdir().unwrap();
        let [written, plain] = ["written", "plain"].map(|name| root.path().join(name));
        write_file(&written, b"x").unwrap();
        fs::write(&plain, b"x").unwrap();
        let readable_as = |path: &Path| fs::metadata(path).unwrap().permissions();
        assert_eq!(readable_as(&written), readable_as(&plain));
    }

    #[test]
    fn a_file_that_cannot_be_written_names_itself() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "x").unwrap();
        let error = write_file(&root.path().join("file/inside"), b"y").unwrap_err();
        assert!(format!("{error:#}").contains("file/inside"), "{error:#}");
    }
}
