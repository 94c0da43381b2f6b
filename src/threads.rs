//! How many threads tensors are computed on.
//!
//! libtorch takes one for every logical processor. Two of them on one core share its vector units, and each waits for
//! the slowest at the end of every operation: one a core is several times faster where the machine has many.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZero;
use std::path::Path;

use sysinfo::System;

/// Where the system says which processors share a core.
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// What sets another number, as libtorch reads it.
const CHOSEN_BY: [&str; 2] = ["OMP_NUM_THREADS", "MKL_NUM_THREADS"];

/// Has tensors computed on one thread a core, unless the environment says how many.
pub fn one_a_core() {
    if CHOSEN_BY.iter().any(|name| std::env::var_os(name).is_some()) {
        return;
    }
    let allowed = fs::read_to_string("/proc/self/status").ok().and_then(|status| allowed_processors(&status));
    let cores = allowed.and_then(|allowed| cores_of(&allowed, Path::new(PROCESSORS)));
    let limit = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads =
        cores.or_else(|| System::physical_core_count().ok()).map_or(limit, |cores| cores.clamp(1, limit));
    if let Ok(threads) = i32::try_from(threads) {
        tch::set_num_threads(threads);
    }
}

/// The processors that this process may run on, from its `status`.
fn allowed_processors(status: &str) -> Option<Vec<usize>> {
    processors(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)
}

/// Numbers of a list as the kernel writes it: `0-3,8,10-11`.
fn processors(list: &str) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        found.extend(first.parse().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(found)
}

/// How many cores these processors belong to; `None` where the system does not say it of one.
fn cores_of(processors: &[usize], folder: &Path) -> Option<usize> {
    let siblings = |processor: &usize| {
        fs::read_to_string(folder.join(format!("cpu{processor}/topology/thread_siblings_list"))).ok()
    };
    let cores: Option<BTreeSet<String>> = processors.iter().map(siblings).collect();
    cores.map(|cores| cores.len()).filter(|cores| *cores > 0)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
mod tests {
    use super::*;

    #[test]
    fn processors_of_one_core_count_once() {
        let folder = tempfile::tempdir().unwrap();
        for (processor, siblings) in [(0, "0,4"), (1, "1,5"), (2, "2,6"), (4, "0,4"), (5, "1,5"), (6, "2,6")]
        {
            let topology = folder.path().join(format!("cpu{processor}/topology"));
            fs::create_dir_all(&topology).unwrap();
            fs::write(topology.join("thread_siblings_list"), format!("{siblings}\n")).unwrap();
        }
        let cores = |processors: &[usize]| cores_of(processors, folder.path());
        assert_eq!(cores(&[0, 1, 2, 4, 5, 6]), Some(3));
        // Where only some may be used, only their cores count.
        assert_eq!(cores(&[1, 4, 5]), Some(2));
        assert_eq!(cores(&[0, 3]), None);
        assert_eq!(cores(&[]), None);
    }

    #[test]
    fn lists_of_the_system_are_understood() {
        let status = "Name:\tgranite\nCpus_allowed:\tf0f\nCpus_allowed_list:\t0-3,8,10-11\nThreads:\t1\n";
        assert_eq!(allowed_processors(status), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(allowed_processors("Name:\tgranite\n"), None);
        assert_eq!(processors("0-x"), None);
        assert_eq!(processors(""), None);
    }
}
