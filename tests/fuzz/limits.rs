//! What an input may take of the memory.

use std::fs;

/// Address space that the process may take beyond what it had: no input is larger than 1 MiB.
pub const MOST_KIB: u64 = 4 << 20;

/// The largest address space that this process had, in KiB; 0 where the system does not tell.
pub fn address_space() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
