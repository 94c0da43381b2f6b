//! Size and hash of a file as stored.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use super::BUFFER;
use crate::data::tokenizer::hex;

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
    let read = || -> io::Result<Fingerprint> {
        let mut file = File::open(path)?;
        let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; BUFFER]);
        loop {
            let count = file.read(&mut buffer)?;
            let Some(chunk) = buffer.get(..count).filter(|chunk| !chunk.is_empty()) else { break };
            hash.update(chunk);
            bytes += count as u64;
        }
        Ok(Fingerprint { bytes, sha256: hex(&hash.finalize()) })
    };
    read().with_context(|| format!("cannot read `{}`", path.display()))
}
