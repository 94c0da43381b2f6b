//! Size and hash of a file as stored.

use std::fs::File;
use std::io::{self, Read as _};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use super::BUFFER;
use crate::hex::hex;

/// Size and SHA-256 of a file as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// Size.
    pub bytes: u64,
    /// In hex.
    pub sha256: String,
}

/// Hashes a file.
///
/// # Errors
/// When it cannot be read.
pub fn fingerprint(path: &Path) -> Result<Fingerprint> {
    hashed(path, &AtomicBool::new(false))
}

/// Hashes a file while `read` reads what it holds.
///
/// # Errors
/// Those of `read`, and when the file cannot be read.
pub fn fingerprint_beside(path: &Path, read: impl FnOnce() -> Result<()>) -> Result<Fingerprint> {
    let is_vain = AtomicBool::new(false);
    thread::scope(|scope| {
        let hashing = scope.spawn(|| hashed(path, &is_vain));
        let read = read();
        is_vain.store(read.is_err(), Ordering::Relaxed);
        let hashed = hashing.join().unwrap_or_else(|panic| resume_unwind(panic));
        read.and(hashed)
    })
}

/// Hashes a file up to its end, or until it is in vain.
fn hashed(path: &Path, is_vain: &AtomicBool) -> Result<Fingerprint> {
    let read = || -> io::Result<Fingerprint> {
        let mut file = File::open(path)?;
        let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; BUFFER]);
        while !is_vain.load(Ordering::Relaxed) {
            let count = file.read(&mut buffer)?;
            let Some(chunk) = buffer.get(..count).filter(|chunk| !chunk.is_empty()) else { break };
            hash.update(chunk);
            bytes += count as u64;
        }
        Ok(Fingerprint { bytes, sha256: hex(&hash.finalize()) })
    };
    read().with_context(|| format!("cannot read `{}`", path.display()))
}
