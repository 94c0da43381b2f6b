//! Documents, passages, embeddings, search and prompts.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod chunk;
mod documents;
mod encoder;
mod index;
mod prompt;

use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A folder that is gone after the test, holding `files`.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}
