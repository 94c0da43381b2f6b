//! What the compiler does not check: who may import whom, names, sizes, where `unsafe` lives, what scripts begin with.
//!
//! Each rule is a pure function from a file's path and text to complaints, and is shown below to be able to complain.

#![expect(clippy::unwrap_used, reason = "a test that cannot read its own repository may stop there")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, str};

use granite::recipe::Recipe;

/// No tracked file is larger: weights, dumps and build products do not belong here.
const MAX_BYTES: u64 = 1 << 20;
/// A longer Rust file holds more than one idea.
const MAX_LINES: usize = 800;
/// Files that may be longer, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[];
/// Where `unsafe` may stand, each with its reason.
const UNSAFE_PLACES: &[(&str, &str)] = &[
    ("src/kernels/", "launching kernels, and the C interfaces of libtorch, CUDA and bitsandbytes"),
    ("cuda/bitsandbytes-sys/", "generated declarations"),
    ("src/checkpoint/mapped.rs", "the one memory map of a file"),
];
/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["common", "helper", "helpers", "manager", "misc", "util", "utils"];

/// A tracked file.
struct File {
    /// Relative to the repository root, with `/`.
    path: String,
    bytes: u64,
    /// `None` for what is no UTF-8.
    text: Option<String>,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// What git tracks or would track; a file deleted but not yet staged is left out.
fn files() -> Vec<File> {
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(listing.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listing.stderr));
    let names: BTreeSet<&str> =
        str::from_utf8(&listing.stdout).unwrap().split('\0').filter(|name| !name.is_empty()).collect();
    let files: Vec<File> = names.into_iter().filter_map(read).collect();
    assert!(files.iter().any(|file| file.path == "src/lib.rs"), "the listing of git lacks src/lib.rs");
    files
}

fn read(path: &str) -> Option<File> {
    let raw = fs::read(root().join(path)).ok()?;
    Some(File { path: path.to_string(), bytes: raw.len() as u64, text: String::from_utf8(raw).ok() })
}

/// Applies a rule to every text file that `chosen` takes, and fails with all complaints at once.
fn check(chosen: impl Fn(&str) -> bool, rule: impl Fn(&str, &str) -> Vec<String>) {
    let files = files();
    let texts = files.iter().filter_map(|file| Some((file.path.as_str(), file.text.as_deref()?)));
    let mut seen = 0;
    let mut complaints = Vec::new();
    for (path, text) in texts.filter(|(path, _)| chosen(path)) {
        seen += 1;
        complaints.extend(rule(path, text));
    }
    assert!(seen > 0, "the rule looked at no file");
    none(&complaints);
}

fn none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

fn is_rust(path: &str) -> bool {
    path.ends_with(".rs")
}

// --- reading Rust as text ---

/// Rust source with comments, strings and character literals blanked out; newlines stay, so lines keep their numbers.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = skip_one(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// The end of the comment or literal that starts at `at`; `at` itself where none starts.
fn skip_one(chars: &[char], at: usize) -> usize {
    let starts = |text: &str| text.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    let in_word = at > 0 && is_word(chars[at - 1]) && chars[at - 1] != 'b';
    if starts("//") {
        chars[at..].iter().position(|&c| c == '\n').map_or(chars.len(), |n| at + n)
    } else if starts("/*") {
        skip_block(chars, at)
    } else if !in_word && ["r\"", "r#\"", "r##\""].into_iter().any(starts) {
        skip_raw(chars, at)
    } else if starts("\"") {
        skip_quoted(chars, at, '"')
    } else if starts("'\\") || (starts("'") && chars.get(at + 2) == Some(&'\'')) {
        // 'a' and '\n' are literals; 'a without a closing quote is a lifetime.
        skip_quoted(chars, at, '\'')
    } else {
        at
    }
}

fn skip_block(chars: &[char], at: usize) -> usize {
    let mut depth = 0;
    let mut end = at;
    while end + 1 < chars.len() {
        match (chars[end], chars[end + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                end += 1;
                continue;
            }
        }
        end += 2;
        if depth == 0 {
            return end;
        }
    }
    chars.len()
}

fn skip_raw(chars: &[char], at: usize) -> usize {
    let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
    let closes = |end: usize| chars[end] == '"' && (1..=hashes).all(|i| chars.get(end + i) == Some(&'#'));
    (at + 2 + hashes..chars.len()).find(|&end| closes(end)).map_or(chars.len(), |end| end + 1 + hashes)
}

fn skip_quoted(chars: &[char], at: usize, quote: char) -> usize {
    let mut end = at + 1;
    while end < chars.len() {
        match chars[end] {
            '\\' => end += 2,
            c if c == quote => return end + 1,
            _ => end += 1,
        }
    }
    chars.len()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands as a whole word.
fn word_starts(text: &str, word: &str) -> Vec<usize> {
    let whole = |at: usize| !text[..at].ends_with(is_word) && !text[at + word.len()..].starts_with(is_word);
    text.match_indices(word).map(|(at, _)| at).filter(|&at| whole(at)).collect()
}

/// 1-based.
fn line_of(text: &str, at: usize) -> usize {
    1 + text[..at].matches('\n').count()
}

/// The part of a source file that ships: what stands before its test module.
fn without_tests(code: &str) -> &str {
    code.find("#[cfg(test)]").map_or(code, |at| &code[..at])
}

// --- direction of dependencies ---

/// What a module of the table in ARCHITECTURE.md may import.
#[derive(Debug, PartialEq)]
enum Imports {
    /// These module paths and all below them.
    Only(Vec<String>),
    /// Every other module, but no sibling of its own files: `commands`.
    AllButEachOther,
}

/// The table under `## Modules`.
#[derive(Debug)]
struct Table {
    rows: BTreeMap<String, Imports>,
    /// Modules that anyone may import.
    for_all: Vec<String>,
}

fn table(architecture: &str) -> Table {
    let section = architecture.split("\n## ").find(|part| part.starts_with("Modules")).unwrap_or_default();
    let mut rows = BTreeMap::new();
    for row in section.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.trim().trim_matches('|').split('|').collect();
        let last = cells[cells.len() - 1];
        for module in backticked(cells[0]) {
            let all = last.trim().starts_with("everything but each other");
            rows.insert(module, if all { Imports::AllButEachOther } else { Imports::Only(backticked(last)) });
        }
    }
    let sentence = section.split(" may be imported by anyone").next().and_then(|text| text.lines().last());
    Table { rows, for_all: sentence.map(backticked).unwrap_or_default() }
}

fn backticked(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_string).collect()
}

/// The module path of a source file: `src/model/config.rs` → `model::config`, `src/model/mod.rs` → `model`.
fn module_of(path: &str) -> Vec<String> {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs");
    inner.split('/').filter(|part| *part != "mod").map(str::to_string).collect()
}

/// Every path of this crate that the code names, as segments below `crate`; `super` is resolved against the file.
fn crate_paths(module: &[String], code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    for start in word_starts(code, "crate") {
        if let Some(rest) = code[start..].strip_prefix("crate::") {
            expand(rest, &[], &mut paths);
        }
    }
    for start in word_starts(code, "super") {
        // The first `super` of a chain climbs for all of them.
        if !code[..start].ends_with("super::") {
            let (at, rest) = climb(module, &code[start..]);
            expand(rest, at, &mut paths);
        }
    }
    paths
}

fn climb<'a>(mut module: &'a [String], mut text: &'a str) -> (&'a [String], &'a str) {
    while let Some(rest) = text.strip_prefix("super::") {
        module = module.split_last().map_or(module, |(_, parent)| parent);
        text = rest;
    }
    (module, text)
}

/// Follows `a::b::{c, d::e}` from its first segment and collects the leaves; returns what is left of the text.
fn expand<'a>(mut text: &'a str, prefix: &[String], leaves: &mut Vec<Vec<String>>) -> &'a str {
    let mut path = prefix.to_vec();
    loop {
        text = text.trim_start();
        if let Some(group) = text.strip_prefix('{') {
            return expand_group(group, &path, leaves);
        }
        let length = text.find(|c| !is_word(c)).unwrap_or(text.len());
        if length > 0 && &text[..length] != "self" {
            path.push(text[..length].to_string());
        }
        text = &text[length..];
        match text.strip_prefix("::") {
            // A turbofish ends the path.
            Some(rest) if !rest.starts_with('<') => text = rest,
            _ => {
                leaves.push(path);
                return text;
            }
        }
    }
}

fn expand_group<'a>(mut text: &'a str, prefix: &[String], leaves: &mut Vec<Vec<String>>) -> &'a str {
    loop {
        text = text.trim_start_matches(|c: char| c == ',' || c.is_whitespace());
        match text.strip_prefix('}') {
            Some(rest) => return rest,
            None if text.is_empty() => return text,
            None => text = expand(text, prefix, leaves),
        }
        // Past `as name` and `*`.
        text = &text[text.find([',', '}']).unwrap_or(text.len())..];
    }
}

/// Complaints about imports of one source file that the table does not allow.
fn wrong_imports(path: &str, text: &str, table: &Table) -> Vec<String> {
    let module = module_of(path);
    let top = &module[0];
    let Some(imports) = table.rows.get(top) else {
        return vec![format!("{path}: module `{top}` is not in the table of ARCHITECTURE.md")];
    };
    let allowed = |target: &[String]| {
        let Some(first) = target.first().filter(|first| table.rows.contains_key(*first)) else { return true };
        match imports {
            _ if table.for_all.contains(first) => true,
            Imports::AllButEachOther if first == top => {
                path.ends_with("/mod.rs") || target.get(1).is_none_or(|leaf| module.get(1) == Some(leaf))
            }
            Imports::AllButEachOther => true,
            Imports::Only(list) => first == top || list.iter().any(|prefix| is_below(target, prefix)),
        }
    };
    let code = code_only(text);
    let paths: BTreeSet<Vec<String>> = crate_paths(&module, without_tests(&code)).into_iter().collect();
    let wrong = paths.iter().filter(|target| !allowed(target));
    wrong
        .map(|target| {
            format!("{path}: `{top}` may not import `crate::{}` (ARCHITECTURE.md)", target.join("::"))
        })
        .collect()
}

fn is_below(target: &[String], prefix: &str) -> bool {
    let prefix: Vec<&str> = prefix.split("::").collect();
    target.len() >= prefix.len() && prefix.iter().zip(target).all(|(a, b)| a == b)
}

fn is_module_file(path: &str) -> bool {
    path.starts_with("src/")
        && is_rust(path)
        && !["src/main.rs", "src/lib.rs"].contains(&path)
        && !path.ends_with("/tests.rs")
}

#[test]
fn modules_import_only_what_the_table_gives_them() {
    let table = table(&fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap());
    assert!(table.rows.len() > 10 && !table.for_all.is_empty(), "the table was not understood: {table:?}");
    check(is_module_file, |path, text| wrong_imports(path, text, &table));
}

#[test]
fn a_wrong_import_is_found() {
    let table = table(
        "# A\n\n## Modules\n\n| module | owns | imports |\n|---|---|---|\n| `leaf` | x | – |\n\
         | `mid`, `log` | x | `leaf`, `top::types` |\n| `top` | x | everything but each other |\n\n\
         `log` may be imported by anyone. `tests/tidy.rs` asserts this table.\n",
    );
    assert_eq!(table.rows["leaf"], Imports::Only(vec![]));
    assert_eq!(table.for_all, ["log"]);
    let wrong = |path: &str, text: &str| wrong_imports(path, text, &table).len();

    assert_eq!(wrong("src/leaf/a.rs", "use crate::mid::X;"), 1);
    assert_eq!(wrong("src/leaf/a.rs", "fn f() { crate::mid::g() }"), 1);
    assert_eq!(wrong("src/leaf/a.rs", "use super::super::mid::X;"), 1);
    assert_eq!(wrong("src/leaf/a.rs", "use super::b::X; use crate::log::say; use crate::leaf::c;"), 0);
    assert_eq!(wrong("src/leaf/a.rs", "// use crate::mid::X;\nconst S: &str = \"crate::mid::X\";"), 0);
    assert_eq!(wrong("src/leaf/a.rs", "#[cfg(test)]\nmod tests { use crate::mid::X; }"), 0);
    assert_eq!(wrong("src/leaf.rs", "use crate::{\n    log::{self, say as s},\n    mid::{A, b::C},\n};"), 2);
    assert_eq!(wrong("src/mid.rs", "use crate::{leaf::*, top::types::T};"), 0);
    assert_eq!(wrong("src/mid.rs", "use crate::top::run;"), 1);
    assert_eq!(wrong("src/mid.rs", "use crate::{leaf::{*, a}, top};"), 1);
    assert_eq!(wrong("src/top/a.rs", "use crate::{leaf::X, mid::Y};"), 0);
    assert_eq!(wrong("src/top/a.rs", "use crate::top::b::run;"), 1);
    assert_eq!(wrong("src/top/a.rs", "use super::b::run;"), 1);
    assert_eq!(wrong("src/top/mod.rs", "use crate::top::b::run;"), 0);
    assert_eq!(wrong("src/new.rs", ""), 1);
}

// --- names, sizes, words ---

fn empty_names(path: &str) -> Vec<String> {
    let parts = path.split('/').map(|part| part.split('.').next().unwrap_or(part));
    let empty = parts.filter(|part| EMPTY_NAMES.contains(part));
    empty.map(|part| format!("{path}: `{part}` says nothing about what is inside")).collect()
}

#[test]
fn names_say_what_is_inside() {
    check(|_| true, |path, _| empty_names(path));
    for bad in ["src/data/utils.rs", "src/common/mod.rs", "tests/helpers.rs", "scripts/misc"] {
        assert_eq!(empty_names(bad).len(), 1, "{bad}");
    }
    assert_eq!(empty_names("src/data/manage.rs").len(), 0);
}

fn too_large(path: &str, bytes: u64) -> Option<String> {
    (bytes > MAX_BYTES).then(|| format!("{path}: {bytes} bytes, the limit is {MAX_BYTES}"))
}

fn too_long(path: &str, text: &str) -> Vec<String> {
    let lines = text.lines().count();
    if lines <= MAX_LINES || LONG_FILES.iter().any(|(file, _)| *file == path) {
        return Vec::new();
    }
    vec![format!("{path}: {lines} lines, the limit is {MAX_LINES}; split it, or list it with a reason")]
}

#[test]
fn files_are_small() {
    let large: Vec<String> = files().iter().filter_map(|file| too_large(&file.path, file.bytes)).collect();
    none(&large);
    check(is_rust, too_long);
    assert!(
        too_large("weights.bin", MAX_BYTES + 1).is_some() && too_large("weights.bin", MAX_BYTES).is_none()
    );
    assert_eq!(too_long("src/long.rs", &"\n".repeat(MAX_LINES + 1)).len(), 1);
    assert_eq!(too_long("src/long.rs", &"\n".repeat(MAX_LINES)).len(), 0);
}

/// Words that mark work left open; spelled apart, so that this file passes its own rule.
fn open_work(path: &str, text: &str) -> Vec<String> {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let found =
        words.into_iter().flat_map(|word| word_starts(text, word).into_iter().map(move |at| (at, word)));
    found.map(|(at, word)| format!("{path}:{}: `{word}`", line_of(text, at))).collect()
}

fn written_by_hand(path: &str) -> bool {
    let ends = [".rs", ".cu", ".cuh", ".cpp", ".h", ".py", ".toml", ".md", ".txt"];
    ends.iter().any(|end| path.ends_with(end)) || path.starts_with("scripts/") || path.starts_with(".ci/")
}

#[test]
fn no_work_is_left_open() {
    check(written_by_hand, open_work);
    assert_eq!(open_work("a.rs", concat!("x\n// TO", "DO: later\n")), [concat!("a.rs:2: `TO", "DO`")]);
    assert_eq!(open_work("a.rs", concat!("// FIX", "ME XX", "X")).len(), 2);
    assert_eq!(open_work("a", "mktemp -d x.XXXXXX").len(), 0);
}

fn ignored_tests(path: &str, text: &str) -> Vec<String> {
    let code = code_only(text);
    let found = code.match_indices("#[ignore").chain(code.match_indices("should_panic"));
    found.map(|(at, word)| format!("{path}:{}: `{word}`", line_of(&code, at))).collect()
}

#[test]
fn no_test_is_ignored_or_expected_to_panic() {
    check(is_rust, ignored_tests);
    assert_eq!(ignored_tests("a.rs", "#[test]\n#[ignore = \"slow\"]\nfn f() {}"), ["a.rs:2: `#[ignore`"]);
    assert_eq!(ignored_tests("a.rs", "// #[ignore]").len(), 0);
}

/// `#[allow(…)]` and `#[expect(…)]` that give no reason.
fn silenced_lints(path: &str, text: &str) -> Vec<String> {
    let code = code_only(text);
    let forms = ["#[allow(", "#![allow(", "#[expect(", "#![expect("];
    let starts = forms.iter().flat_map(|form| code.match_indices(form).map(|(at, _)| at));
    let silent = starts.filter(|&at| {
        let end = code[at..].find(")]").map_or(code.len(), |n| at + n);
        !code[at..end].contains("reason =")
    });
    silent.map(|at| format!("{path}:{}: a lint is silenced without a reason", line_of(&code, at))).collect()
}

#[test]
fn silenced_lints_have_reasons() {
    check(is_rust, silenced_lints);
    assert_eq!(silenced_lints("a.rs", "#[allow(dead_code)]\nfn f() {}").len(), 1);
    assert_eq!(silenced_lints("a.rs", "#![expect(\n    dead_code\n)]\n").len(), 1);
    assert_eq!(silenced_lints("a.rs", "#[expect(dead_code, reason = \"why\")]\nfn f() {}").len(), 0);
}

fn misplaced_unsafe(path: &str, text: &str) -> Vec<String> {
    if UNSAFE_PLACES.iter().any(|(place, _)| path.starts_with(place)) {
        return Vec::new();
    }
    let code = code_only(text);
    let found = word_starts(&code, "unsafe").into_iter();
    found.map(|at| format!("{path}:{}: `unsafe` outside the listed places", line_of(&code, at))).collect()
}

#[test]
fn unsafe_has_an_address() {
    check(is_rust, misplaced_unsafe);
    let code = "fn f() { unsafe { g() } }";
    assert_eq!(misplaced_unsafe("src/data/a.rs", code).len(), 1);
    assert_eq!(misplaced_unsafe("src/kernels/a.rs", code).len(), 0);
    assert_eq!(misplaced_unsafe("src/data/a.rs", "// unsafe\n#![deny(unsafe_code)]").len(), 0);
}

/// Folders of one person's machine; a path in a tracked file works nowhere else.
fn machine_paths(path: &str, text: &str) -> Vec<String> {
    let folders = [concat!("/ro", "ot/"), concat!("/wo", "rk/"), concat!("/ho", "me/")];
    let inside =
        |at: usize| text[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || "_.-/}>)*".contains(c));
    let found = folders.iter().flat_map(|folder| text.match_indices(folder).map(|(at, _)| at));
    found
        .filter(|&at| !inside(at))
        .map(|at| format!("{path}:{}: a path of one machine", line_of(text, at)))
        .collect()
}

#[test]
fn no_path_of_one_machine() {
    check(|_| true, machine_paths);
    assert_eq!(machine_paths("a.md", concat!("see `/ro", "ot/.cache/x`")).len(), 1);
    assert_eq!(machine_paths("a.md", concat!("x=/ho", "me/me/y\n\n/wo", "rk/z")).len(), 2);
    assert_eq!(machine_paths("a.md", concat!("a site.org/wo", "rk/z and $to/ho", "me/y")).len(), 0);
}

// --- kernels, recipes, scripts ---

/// Every kernel file has its launcher and twin in a file of the same name, or of its first word where several kernels share
/// them (`attention` of `attention_forward`), and a test under tests/kernels that names it.
fn kernels_without_twin(files: &BTreeMap<&str, &str>) -> Vec<String> {
    let stems = files.keys().filter_map(|path| path.strip_prefix("cuda/")?.strip_suffix(".cu"));
    let mut complaints = Vec::new();
    for stem in stems.filter(|stem| !stem.contains('/')) {
        let shared = stem.split('_').next().unwrap_or(stem);
        if ![stem, shared].iter().any(|name| files.contains_key(format!("src/kernels/{name}.rs").as_str())) {
            complaints.push(format!("cuda/{stem}.cu has neither src/kernels/{stem}.rs nor {shared}.rs"));
        }
        let mut tests = files.iter().filter(|(path, _)| path.starts_with("tests/kernels/"));
        if !tests.any(|(_, text)| !word_starts(text, stem).is_empty()) {
            complaints.push(format!("cuda/{stem}.cu: no test under tests/kernels names `{stem}`"));
        }
    }
    complaints
}

#[test]
fn every_kernel_has_a_twin_and_a_test() {
    let files = files();
    let texts = files.iter().map(|file| (file.path.as_str(), file.text.as_deref().unwrap_or_default()));
    none(&kernels_without_twin(&texts.collect()));
    let complaints =
        |files: &[(&'static str, &'static str)]| kernels_without_twin(&files.iter().copied().collect());
    let (kernel, twin) = (("cuda/nf4.cu", ""), ("src/kernels/nf4.rs", ""));
    assert_eq!(complaints(&[kernel, ("cuda/shim/x.cu", "")]).len(), 2);
    assert_eq!(complaints(&[kernel, twin, ("tests/kernels/gpu.rs", "rope nf42")]).len(), 1);
    assert_eq!(complaints(&[kernel, twin, ("tests/kernels/gpu.rs", "use nf4::f;")]).len(), 0);
    let (part, test) = (("cuda/nf4_pack.cu", ""), ("tests/kernels/gpu.rs", "nf4_pack"));
    assert_eq!(complaints(&[part, twin, test]).len(), 0);
    assert_eq!(complaints(&[("cuda/nf_pack.cu", ""), twin, ("tests/kernels/gpu.rs", "nf_pack")]).len(), 1);
}

fn broken_recipe(path: &str, text: &str) -> Vec<String> {
    Recipe::parse(text, Path::new(path), &[]).err().map(|error| error.to_string()).into_iter().collect()
}

#[test]
fn every_recipe_parses() {
    let recipes =
        files().into_iter().filter(|file| file.path.starts_with("recipes/") && file.path.ends_with(".toml"));
    let broken: Vec<String> = recipes
        .flat_map(|file| broken_recipe(&file.path, file.text.as_deref().unwrap_or_default()))
        .collect();
    none(&broken);
    assert_eq!(broken_recipe("recipes/x.toml", "rnak = 8").len(), 1);
}

/// A shell script that does not stop at its first error goes on with half of what it needs. A file without a first
/// line `#!` is sourced, and strict mode would stay on in the reader's shell.
fn lax_script(path: &str, text: &str) -> Vec<String> {
    let first = text.lines().next().unwrap_or_default();
    let runs_in_shell = first.starts_with("#!") && first.ends_with("sh");
    let strict = text.lines().any(|line| line == "set -euo pipefail");
    if runs_in_shell && !strict { vec![format!("{path}: no line `set -euo pipefail`")] } else { Vec::new() }
}

#[test]
fn scripts_are_strict() {
    check(
        |path| !written_by_hand(path) || path.starts_with("scripts/") || path.starts_with(".ci/"),
        lax_script,
    );
    assert_eq!(lax_script("scripts/x", "#!/usr/bin/env bash\necho\n").len(), 1);
    assert_eq!(lax_script("scripts/x", "#!/bin/sh\nset -e\n").len(), 1);
    assert_eq!(lax_script("scripts/x", "#!/usr/bin/env bash\n# What.\nset -euo pipefail\n").len(), 0);
    assert_eq!(lax_script("scripts/x.py", "#!/usr/bin/env python3\n").len(), 0);
}

/// A recipe with a key in it, or an unfinished one, lies untracked beside the others on its writer's machine.
#[test]
fn the_bundle_copies_what_git_tracks() {
    let script = fs::read_to_string(root().join("scripts/bundle")).unwrap();
    let start = script.find("copy_tracked() {").unwrap();
    let function = &script[start..start + script[start..].find("\n}\n").unwrap() + 3];
    let bundled = |with_git: bool| -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("recipes/more")).unwrap();
        fs::create_dir(folder.path().join("out")).unwrap();
        for file in ["recipes/a b.toml", "recipes/more/c.toml", "recipes/mine.toml"] {
            fs::write(folder.path().join(file), "").unwrap();
        }
        let track = "git init -q . && git add 'recipes/a b.toml' recipes/more";
        let text = format!(
            "set -euo pipefail\nexport GIT_CEILING_DIRECTORIES=$PWD/..\n{function}{}\ncopy_tracked recipes out\ncopy_tracked none out\n",
            if with_git { track } else { "" }
        );
        let done = Command::new("bash").args(["-c", &text]).current_dir(folder.path()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let found = ["a b.toml", "more/c.toml", "mine.toml"].into_iter();
        let recipes = folder.path().join("out/recipes");
        found.filter(|name| recipes.join(name).is_file()).map(str::to_string).collect()
    };
    assert_eq!(bundled(true), ["a b.toml", "more/c.toml"]);
    assert_eq!(bundled(false), ["a b.toml", "more/c.toml", "mine.toml"]);
}

#[test]
fn literals_and_comments_are_no_code() {
    let text = "a /* b /* c */ d */ e // f\n\"g \\\" h\" 'i' '\\'' 'j r#\"k \" l\"# m";
    let words: Vec<String> = code_only(text).split_whitespace().map(str::to_string).collect();
    assert_eq!(words, ["a", "e", "'j", "m"]);
    assert_eq!(code_only(text).lines().count(), text.lines().count());
}
