//! The targets of `tests/fuzz` under libFuzzer. The program runs the target that it is called after.
//!
//! With `GRANITE_FUZZ_SEEDS=FOLDER` it writes the target's whole files there, and the words of its format as
//! `FOLDER.dict`, and ends: what a corpus begins with.

#![no_main]

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::Write as _;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use libfuzzer_sys::fuzz_target;

#[path = "../fuzz/limits.rs"]
mod limits;
#[path = "../fuzz/seeds.rs"]
mod seeds;
#[path = "../fuzz/targets.rs"]
mod targets;

use targets::{TARGETS, Target};

/// Where the tiny models lie.
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures");

/// What stays the same from input to input.
struct Fuzzing {
    target: Target,
    /// A folder of the target's own.
    folder: PathBuf,
    /// Address space before the first input, in KiB.
    before: u64,
}

static FUZZING: OnceLock<Fuzzing> = OnceLock::new();

/// What the last panic said: some are caught, and are no news.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fuzz_target!(init: begin(), |bytes: &[u8]| {
    let fuzzing = FUZZING.get().expect("libFuzzer begins with the beginning");
    one(fuzzing, bytes);
});

fn begin() {
    let called = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    let name = called.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some((name, target)) = TARGETS.iter().find(|(known, _)| *known == name) else {
        eprintln!("there is no target `{name}`; there are {:?}", TARGETS.map(|(known, _)| known));
        std::process::exit(2);
    };
    if let Some(folder) = std::env::var_os("GRANITE_FUZZ_SEEDS") {
        write_seeds(name, Path::new(&folder)).expect("the seeds' folder can be written");
        std::process::exit(0);
    }
    granite::progress::set_quiet(true);
    std::panic::set_hook(Box::new(|panic| {
        let mut text = panic.to_string();
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            let _ = write!(text, "\n{trace}");
        }
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }));
    let folder = tempfile::Builder::new().prefix(name).tempdir().expect("TMPDIR can be written").keep();
    FUZZING.get_or_init(|| Fuzzing { target: *target, folder, before: limits::address_space() });
}

fn one(fuzzing: &Fuzzing, bytes: &[u8]) {
    let ended = catch_unwind(AssertUnwindSafe(|| drop((fuzzing.target)(&fuzzing.folder, bytes))));
    if ended.is_err() {
        eprintln!("{}", LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner));
        std::process::abort();
    }
    let grown = limits::address_space().saturating_sub(fuzzing.before);
    if grown > limits::MOST_KIB {
        eprintln!("{grown} KiB of address space more than before the first input");
        std::process::abort();
    }
}

/// Whole files, and words as libFuzzer's dictionaries have them: quoted, with escapes for what is no plain letter.
fn write_seeds(target: &str, folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let (files, words) = seeds::of(target);
    for (at, bytes) in files.iter().enumerate() {
        fs::write(folder.join(format!("seed-{at}")), bytes)?;
    }
    let mut text = String::new();
    for word in words {
        let escaped = word.bytes().map(|byte| match byte {
            b'"' | b'\\' => format!("\\{}", char::from(byte)),
            b' '..=b'~' => char::from(byte).to_string(),
            _ => format!("\\x{byte:02X}"),
        });
        let _ = writeln!(text, "\"{}\"", escaped.collect::<String>());
    }
    fs::write(folder.with_extension("dict"), text)
}
