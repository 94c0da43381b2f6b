//! A hash that names the content of a model's weights without reading all of them.

use sha2::{Digest as _, Sha256};

use crate::hex::hex;

/// Windows of a tensor that are read, spread evenly from its first byte to its last.
const WINDOWS: usize = 8;

/// Bytes of a window. 8 windows of 512 bytes of each of 8B's 363 tensors are 1.5 MB instead of 16 GB.
const WINDOW: usize = 512;

/// Gathers tensors into a hash; feed them in a fixed order.
#[derive(Debug, Default)]
pub struct Fingerprint {
    hash: Sha256,
}

impl Fingerprint {
    /// Adds a tensor: its name, format, shape, size and sampled bytes.
    pub fn add(&mut self, name: &str, format: &str, shape: &[i64], bytes: &[u8]) {
        self.hash.update(format!("{name}\0{format}\0{shape:?}\0{}\0", bytes.len()));
        if bytes.len() <= WINDOWS * WINDOW {
            self.hash.update(bytes);
            return;
        }
        let last = bytes.len() - WINDOW;
        for window in 0..WINDOWS {
            // In u128, because a length times 7 may pass the end of a 64-bit number.
            let start = (last as u128 * window as u128 / (WINDOWS as u128 - 1)) as usize;
            self.hash.update(&bytes[start..start + WINDOW]);
        }
    }

    /// The hash in hex.
    pub fn finish(self) -> String {
        hex(&self.hash.finalize())
    }
}
