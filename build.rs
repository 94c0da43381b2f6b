//! Makes the program find libtorch without environment variables, checks that it is the version tch was written for,
//! and compiles the CUDA kernels (`cuda/compile.rs`).

#[path = "cuda/compile.rs"]
mod compile;

use std::path::Path;
use std::process::ExitCode;

/// The libtorch that tch 0.24 binds.
const LIBTORCH: &str = "2.11";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda/compile.rs");
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // One directive a line: a compiler's message has several.
            message.lines().for_each(|line| println!("cargo::error={line}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let folder = variable("DEP_TCH_LIBTORCH_LIB").ok_or(
        "torch-sys did not say where libtorch lies; is LIBTORCH set to a folder with `lib` and `include`?",
    )?;
    check_libtorch(Path::new(&folder))?;
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    compile_bridge(Path::new(&folder));
    compile::run(Path::new(&folder))
}

/// Compiles what tch does not bind of libtorch. `cc` ends the build with the compiler's words when it fails.
fn compile_bridge(folder: &Path) {
    const SOURCE: &str = "cuda/libtorch/bridge.cpp";
    println!("cargo:rerun-if-changed={SOURCE}");
    let include = folder.join("../include");
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .warnings(true)
        .flag("-isystem")
        .flag(include)
        .file(SOURCE)
        .compile("granite_libtorch_bridge");
}

/// A wheel of torch says its version in `torch/version.py`; other builds of libtorch say nothing and are taken as they are.
fn check_libtorch(folder: &Path) -> Result<(), String> {
    let file = folder.join("../version.py");
    let Ok(text) = std::fs::read_to_string(&file) else { return Ok(()) };
    println!("cargo:rerun-if-changed={}", file.display());
    let found = text.lines().find_map(|line| line.strip_prefix("__version__ = '")?.strip_suffix('\''));
    match found {
        Some(version) if version.starts_with(&format!("{LIBTORCH}.")) => Ok(()),
        found => Err(format!(
            "libtorch in `{}` is version {}, tch needs {LIBTORCH}: run scripts/setup, or set LIBTORCH to a torch {LIBTORCH}",
            folder.display(),
            found.unwrap_or("unknown"),
        )),
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
