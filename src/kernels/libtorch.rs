//! Which libtorch the process has loaded.

use std::fs;
use std::path::{Path, PathBuf};

/// A libtorch that has been loaded.
#[derive(Debug, Clone)]
pub struct Libtorch {
    /// The folder of `libtorch_cpu.so`.
    pub folder: PathBuf,
    /// `2.11.0+cu130`, where it comes from a Python package.
    pub version: Option<String>,
}

/// The libtorch of this process, or `None` where the system does not tell what it has loaded.
pub fn loaded() -> Option<Libtorch> {
    let folder = folder_of("libtorch_cpu.so")?;
    let version = fs::read_to_string(folder.join("../version.py")).ok().as_deref().and_then(version);
    Some(Libtorch { folder, version })
}

/// The folder from which a shared object was loaded.
fn folder_of(library: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    // address perms offset device inode path
    let path = maps.lines().filter_map(|line| line.find('/').map(|start| &line[start..])).map(Path::new);
    let found = path.into_iter().find(|path| path.file_name().is_some_and(|name| name == library))?;
    found.parent().map(Path::to_path_buf)
}

/// The version in a `torch/version.py`.
fn version(text: &str) -> Option<String> {
    let found = text.lines().find_map(|line| line.strip_prefix("__version__ = '")?.strip_suffix('\''));
    found.map(str::to_string)
}

/// Which of its sets of CPU kernels libtorch takes here, by its own rule: AVX512 wants the F, VL, BW and DQ parts and FMA,
/// AVX2 wants FMA. (The variable ATEN_CPU_CAPABILITY may ask for less.)
pub fn cpu_kernels() -> &'static str {
    let features = features();
    let all = |wanted: &[&str]| wanted.iter().all(|wanted| features.contains(wanted));
    if !all(&["avx2", "fma"]) {
        "default"
    } else if all(&["avx512f", "avx512vl", "avx512bw", "avx512dq"]) {
        "AVX512"
    } else {
        "AVX2"
    }
}

/// The processor's vector instructions: `avx2 fma`, or `no AVX`.
pub fn vectors() -> String {
    let features = features();
    if features.is_empty() { "no AVX".to_string() } else { features.join(" ") }
}

/// Those of the vector instructions that matter to libtorch or to us.
fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::is_x86_feature_detected as has;
        let features = [
            ("avx", has!("avx")),
            ("avx2", has!("avx2")),
            ("fma", has!("fma")),
            ("avx512f", has!("avx512f")),
            ("avx512vl", has!("avx512vl")),
            ("avx512bw", has!("avx512bw")),
            ("avx512dq", has!("avx512dq")),
            ("avx512bf16", has!("avx512bf16")),
        ];
        features.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_libtorch_it_runs_on() {
        // Any call makes sure that it is loaded.
        assert!(tch::get_num_threads() > 0);
        let found = loaded().expect("libtorch is linked");
        assert!(found.folder.join("libtorch_cpu.so").is_file(), "{found:?}");
    }

    #[test]
    fn reads_a_version() {
        assert_eq!(version("a = 1\n__version__ = '2.11.0+cu130'\n").as_deref(), Some("2.11.0+cu130"));
        assert_eq!(version("nothing"), None);
    }
}
