//! The one memory map: model files are read where they lie.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use memmap2::Mmap;

use crate::error::user_error;

/// What a Git-LFS pointer begins with: the 130 bytes that stand for a file that was not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// A file as bytes.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    map: Mmap,
}

impl Mapped {
    /// Maps a file.
    ///
    /// # Errors
    /// When the file cannot be opened, is empty, or is a Git-LFS pointer in place of the file.
    #[expect(unsafe_code, reason = "the one memory map")]
    pub fn open(path: &Path) -> Result<Self> {
        let context = || format!("cannot open `{}`", path.display());
        let file = File::open(path).with_context(context)?;
        ensure!(file.metadata().with_context(context)?.is_file(), "`{}` is no file", path.display());
        // SAFETY: the map is private and read-only. Another process that cut the file meanwhile would end this
        // one with SIGBUS; model files are written once, by rename, so that is not what happens to them.
        let map = unsafe { Mmap::map(&file) }.with_context(context)?;
        ensure!(!map.is_empty(), "`{}` is empty", path.display());
        if map.starts_with(LFS_POINTER) {
            return Err(user_error(
                format!("`{}` is a Git-LFS pointer, not the file itself", path.display()),
                "fetch it with `git lfs pull`",
            ));
        }
        Ok(Self { path: path.to_path_buf(), map })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All of its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}
