//! The build script's part: what nvcc says is read right, and what it made is embedded.

#[path = "../../cuda/compile.rs"]
#[allow(
    dead_code,
    clippy::print_stdout,
    reason = "the build script runs it whole and talks to cargo; here its reading is tested"
)]
mod compile;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;

use compile::{CUBINS, PTX, Resources, SPILLS_ALLOWED, TARGETS, parse_resources, spills_allowed, targets};
use granite::kernels::images::{IMAGES, NVCC, inventory};

use crate::skipped;

const LOG: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 99.703 ms
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers, 408 bytes cmem[0]
";

#[test]
fn reads_registers_spills_and_shared_memory() {
    let first =
        Resources { name: "first".into(), registers: 255, spill_stores: 12, spill_loads: 20, shared: 4096 };
    let second = Resources { name: "second".into(), registers: 22, ..Resources::default() };
    assert_eq!(parse_resources(LOG), [first, second]);
    assert_eq!(parse_resources(""), []);
}

#[test]
fn spilling_is_allowed_only_with_a_reason() {
    assert!(spills_allowed(&format!("#include <x>\n{SPILLS_ALLOWED}measured faster than two passes\n")));
    assert!(!spills_allowed(SPILLS_ALLOWED));
    assert!(!spills_allowed("int x;"));
}

#[test]
fn a_source_names_its_targets_or_has_all() {
    let all: Vec<&str> = CUBINS.into_iter().chain([PTX]).collect();
    assert_eq!(targets("// a kernel\nint x;").expect("all"), all);
    assert_eq!(targets(&format!("// a kernel\n{TARGETS}sm_90a\n")).expect("one"), ["sm_90a"]);
    assert_eq!(targets(&format!("{TARGETS}sm_80 compute_90")).expect("two"), ["sm_80", PTX]);
    let unknown = targets(&format!("{TARGETS}sm_70")).expect_err("no such target");
    assert_eq!(unknown, "`sm_70` is no target, there are sm_80 sm_86 sm_89 sm_90a compute_90");
    assert!(targets(TARGETS).is_err(), "none named");
}

/// Whether there are kernels to look at.
fn compiled() -> bool {
    if NVCC.is_none() {
        assert_ne!(std::env::var("GRANITE_REQUIRE_NVCC").as_deref(), Ok("1"), "built without nvcc");
        skipped("embedded kernels", "built without nvcc");
    }
    NVCC.is_some()
}

#[test]
fn every_source_is_embedded_for_its_targets() {
    if !compiled() {
        return;
    }
    let _ = writeln!(std::io::stderr(), "{}", inventory());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let entries = std::fs::read_dir(folder).expect("cuda/ is there");
    let sources = entries
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension() == Some("cu".as_ref()));
    let expected: BTreeSet<(String, &str)> = sources
        .flat_map(|path| {
            let family = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let targets = targets(&std::fs::read_to_string(&path).expect("text")).expect("known targets");
            targets.into_iter().map(move |target| (family.clone(), target))
        })
        .collect();
    let embedded: BTreeSet<(String, &str)> =
        IMAGES.iter().map(|image| (image.family.to_string(), image.target)).collect();
    assert_eq!(embedded, expected);
}

#[test]
fn images_are_what_they_say() {
    for image in &IMAGES {
        if image.target == PTX {
            assert_eq!(image.bytes.last(), Some(&0), "PTX is a C string");
            let text = std::str::from_utf8(image.bytes).expect("PTX is text");
            assert!(
                text.contains(".target sm_90\n") || text.contains(".target sm_90,"),
                "PTX for {}",
                image.target
            );
        } else {
            assert!(image.bytes.starts_with(b"\x7fELF"), "{} for {}", image.family, image.target);
            assert!(!image.kernels.is_empty(), "{} for {} names no kernel", image.family, image.target);
        }
        for kernel in image.kernels {
            assert!(kernel.registers > 0, "{kernel:?}");
            let source = format!("{}/cuda/{}.cu", env!("CARGO_MANIFEST_DIR"), image.family);
            let source = std::fs::read_to_string(source).expect("the source is there");
            assert!(kernel.spill_stores == 0 || spills_allowed(&source), "{kernel:?} on {}", image.target);
        }
    }
}
