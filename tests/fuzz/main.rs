//! Whatever a file holds, reading it ends: with what it says or with an error, never with a panic, without end, or in an
//! allocation that the file's size does not justify.
//!
//! Each target takes damaged copies of whole files for a second. `GRANITE_FUZZ_SECONDS=3600` makes it an hour,
//! `GRANITE_FUZZ_SEED` begins elsewhere. Where one fails, its input lies in the folder that the message names.
//! `scripts/fuzz` runs the same targets under libFuzzer, which keeps what reaches new code.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod limits;
mod mutate;
mod seeds;
mod targets;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use limits::{MOST_KIB, address_space};
use mutate::Random;
use targets::TARGETS;

/// An input that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the tiny models lie.
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().map_or(otherwise, |text| text.parse().unwrap())
}

fn folder_of(name: &str) -> PathBuf {
    // In memory where there is such a place: a disk takes longer to replace a file than a reader to refuse it.
    let memory = Path::new("/dev/shm");
    let root = if memory.is_dir() { memory } else { Path::new(env!("CARGO_TARGET_TMPDIR")) };
    let folder = root.join(format!("granite-fuzz-{}", std::process::id())).join(name);
    fs::remove_dir_all(&folder).ok();
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Ends the process when one input takes too long: nothing else stops a loop.
fn watch(name: String, input: Arc<AtomicU64>, done: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let (mut last, mut since) = (u64::MAX, Instant::now());
        while !done.load(Ordering::Relaxed) {
            let now = input.load(Ordering::Relaxed);
            if now != last {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() > PATIENCE {
                eprintln!("target {name} hangs on input {now}");
                std::process::abort();
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
}

fn fuzz(name: &str) {
    granite::progress::set_quiet(true);
    let target = TARGETS.iter().find(|(known, _)| *known == name).unwrap().1;
    let (seeds, words) = seeds::of(name);
    let folder = folder_of(name);
    let (seed, seconds) = (number("GRANITE_FUZZ_SEED", 0), number("GRANITE_FUZZ_SECONDS", 1));
    for whole in &seeds {
        // Not all seeds are files of the target; none may end it.
        let _ = target(&folder, whole);
    }
    let (input, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    watch(name.to_string(), input.clone(), done.clone());
    let (start, before) = (Instant::now(), address_space());
    let mut accepted = 0u64;
    while start.elapsed() < Duration::from_secs(seconds) {
        let index = input.fetch_add(1, Ordering::Relaxed);
        let bytes = mutate::mutated(
            &seeds,
            words,
            &mut Random::new(seed ^ index.wrapping_mul(0x2545_f491_4f6c_dd1d)),
        );
        fs::write(folder.join("input"), &bytes).unwrap();
        accepted += u64::from(target(&folder, &bytes).is_ok());
        if index.is_multiple_of(16) {
            let grown = address_space().saturating_sub(before);
            assert!(
                grown < MOST_KIB,
                "{name}: {grown} KiB more after input {index} of seed {seed}: {}",
                folder.display()
            );
        }
    }
    done.store(true, Ordering::Relaxed);
    let tried = input.load(Ordering::Relaxed);
    eprintln!("{name}: {tried} inputs in {seconds} s, {accepted} accepted");
    assert!(tried > 0);
    fs::remove_dir_all(&folder).ok();
    // The last target takes the folder of all with it.
    folder.parent().map(fs::remove_dir);
}

macro_rules! fuzzed {
    ($($name:ident)*) => {
        $(#[test] fn $name() { fuzz(stringify!($name)); })*

        #[test]
        fn every_target_is_fuzzed() {
            assert_eq!(TARGETS.map(|(name, _)| name), [$(stringify!($name)),*]);
        }
    };
}

fuzzed! {
    records columns saved_folder sources card schemas answer recipe template gguf safetensors weights model_config adapter_config adapter_tensors tokenizer_json
    tokenizer_config dataset_rows run_state nf4_cache
}

/// `tests/fuzz-guided` has a program for each target.
#[test]
fn every_target_is_fuzzed_with_guidance() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz-guided/Cargo.toml");
    let text = fs::read_to_string(path).unwrap();
    let programs: Vec<&str> = text
        .split("[[bin]]\nname = \"")
        .skip(1)
        .filter_map(|part| part.split_once('"').map(|(name, _)| name))
        .collect();
    assert_eq!(programs, TARGETS.map(|(name, _)| name));
}

#[test]
fn a_template_that_never_ends_is_stopped() {
    let loops =
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a * b %}{% endfor %}{% endfor %}";
    let error = targets::template(Path::new(""), loops.as_bytes()).unwrap_err();
    assert!(format!("{error:#}").contains("fuel"), "{error:#}");
    let text = "{% set x = 'a' * 1000 * 1000 %}{% for a in range(99999) %}{{ x }}{% endfor %}";
    let error = targets::template(Path::new(""), text.as_bytes()).unwrap_err();
    assert!(format!("{error:#}").contains("the chat template refuses"), "{error:#}");
    let deep = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}";
    targets::template(Path::new(""), deep.as_bytes()).unwrap_err();
    let wide = "{{ messages | tojson(indent=4000000000) }}";
    let error = targets::template(Path::new(""), wide.as_bytes()).unwrap_err();
    assert!(format!("{error:#}").contains("indent of 4000000000"), "{error:#}");
    let narrow = "{{ messages | tojson(indent=32) }}";
    let error = targets::template(Path::new(""), narrow.as_bytes()).unwrap_err();
    assert!(!format!("{error:#}").contains("indent of"), "{error:#}");
    let chain = format!("{{{{ 1{} }}}}", "+x".repeat(10_000));
    let _ = targets::template(Path::new(""), chain.as_bytes());
    let chain = format!("{{{{ x{} }}}}", ".y".repeat(10_000));
    let _ = targets::template(Path::new(""), chain.as_bytes());
    let chain = format!("{{{{ x{} }}}}", "|e".repeat(10_000));
    let _ = targets::template(Path::new(""), chain.as_bytes());
    let long = " ".repeat(1 << 18);
    let error = targets::template(Path::new(""), long.as_bytes()).unwrap_err();
    assert!(format!("{error:#}").contains("262144 bytes"), "{error:#}");
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000));
    targets::template(Path::new(""), nested.as_bytes()).unwrap_err();
}

/// Numbers of parquet's footer are zigzag: an odd one is negative.
#[test]
fn a_column_at_a_negative_place_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let whole = seeds::of("dataset_rows").0.remove(0);
    let length = u32::from_le_bytes(whole[whole.len() - 8..][..4].try_into().unwrap()) as usize;
    let mut refused = 0;
    for at in whole.len() - 8 - length..whole.len() - 8 {
        let mut bytes = whole.clone();
        bytes[at] |= 1;
        let error = targets::dataset_rows(folder.path(), &bytes).err().map(|error| format!("{error:#}"));
        refused += u32::from(error.is_some_and(|error| error.contains("of row group 0: it has")));
    }
    assert!(refused > 5, "{refused}");
}

#[test]
fn damage_repeats_from_its_seed() {
    let seeds = [b"{\"a\": 12}".to_vec(), vec![0; 4096]];
    let of = |seed| mutate::mutated(&seeds, &["x"], &mut Random::new(seed));
    assert!((0..200).all(|seed| of(seed) == of(seed)));
    assert!((0..200).filter(|seed| !seeds.contains(&of(*seed))).count() > 150);
}
