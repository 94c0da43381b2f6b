//! From `cuda/*.cu` to a table of embedded images: part of the build script, tested by `tests/kernels`.
//!
//! Every source is compiled to a cubin for each architecture of [`CUBINS`] and to PTX for what comes later, or for the
//! targets that it names. Results are cached by the hash of all that decides them, so a second build, or another checkout,
//! compiles nothing. NOTES.md tells the rest.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use sha2::{Digest as _, Sha256};

/// Architectures with machine code of their own: A100, consumer Ampere, Ada, and Hopper with its own instructions.
pub const CUBINS: [&str; 4] = ["sm_80", "sm_86", "sm_89", "sm_90a"];

/// What the driver compiles for anything newer.
pub const PTX: &str = "compute_90";

/// A source in which this stands at the beginning of a line, followed by the reason, may spill registers.
pub const SPILLS_ALLOWED: &str = "// spills allowed: ";

/// A source in which this stands at the beginning of a line, followed by targets, is compiled for these alone.
pub const TARGETS: &str = "// targets: ";

const FLAGS: [&str; 6] = ["-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"];

/// Compiles what lies in `cuda/` and writes `images.rs` to the build's output folder.
///
/// # Errors
/// With the compiler's words when a kernel does not compile, or the kernel's name when it spills.
pub fn run(libtorch: &Path) -> Result<(), String> {
    for name in ["GRANITE_NVCC", "GRANITE_REQUIRE_NVCC", "GRANITE_CACHE", "XDG_CACHE_HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(variable("OUT_DIR").ok_or("cargo did not set OUT_DIR")?);
    let table = match find_nvcc(libtorch) {
        Some(path) => compile_all(&Nvcc::new(path)?, &out)?,
        None if variable("GRANITE_REQUIRE_NVCC").as_deref() == Some("1") => {
            return Err("no nvcc found, and GRANITE_REQUIRE_NVCC=1 asks for it: run scripts/setup, or set GRANITE_NVCC \
                        to its path"
                .to_string());
        }
        None => {
            println!(
                "cargo:warning=no nvcc found: building without GPU kernels. Run scripts/setup, or set GRANITE_NVCC"
            );
            table(None, &[])
        }
    };
    write(&out.join("images.rs"), table.as_bytes())
}

/// The compiler that is asked for, the one beside libtorch (where scripts/setup puts it), or the one on the PATH.
fn find_nvcc(libtorch: &Path) -> Option<PathBuf> {
    if let Some(path) = variable("GRANITE_NVCC") {
        return Some(PathBuf::from(path));
    }
    let beside = libtorch.join("../../nvidia/cu13/bin/nvcc");
    // Named to cargo only where it is: a missing file would make every build start anew.
    if beside.is_file() {
        println!("cargo:rerun-if-changed={}", beside.display());
        return beside.canonicalize().ok();
    }
    println!("cargo:rerun-if-env-changed=PATH");
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

struct Nvcc {
    path: PathBuf,
    /// All it says about its version: part of every cached result's name.
    banner: String,
}

impl Nvcc {
    fn new(path: PathBuf) -> Result<Self, String> {
        let banner = capture(Command::new(&path).arg("--version"))?.0;
        Ok(Self { path, banner })
    }

    /// `V13.0.88` of the banner's last line but one.
    fn version(&self) -> &str {
        self.banner.split_whitespace().find(|word| is_version(word)).unwrap_or("of unknown version")
    }
}

fn is_version(word: &str) -> bool {
    word.strip_prefix('V').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

/// One source for one target.
struct Job<'a> {
    source: &'a Source,
    target: &'static str,
}

/// A `.cu` file.
struct Source {
    /// `dropout` of `cuda/dropout.cu`.
    family: String,
    path: PathBuf,
    text: String,
    targets: Vec<&'static str>,
}

/// What a job left.
#[derive(Debug)]
struct Image {
    family: String,
    target: &'static str,
    file: PathBuf,
    kernels: Vec<Resources>,
}

/// What `ptxas -v` says of one kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resources {
    /// Entry point.
    pub name: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes a thread stores to local memory for want of registers.
    pub spill_stores: u32,
    /// Bytes a thread loads back.
    pub spill_loads: u32,
    /// Static shared memory of a block in bytes.
    pub shared: u32,
}

fn compile_all(nvcc: &Nvcc, out: &Path) -> Result<String, String> {
    let sources = sources()?;
    let includes = includes()?;
    let jobs: Vec<Job<'_>> = sources
        .iter()
        .flat_map(|source| source.targets.iter().map(move |target| Job { source, target }))
        .collect();
    let next = AtomicUsize::new(0);
    let worker = || -> Result<Vec<(usize, Image)>, String> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(index) else { return Ok(done) };
            done.push((index, compile(nvcc, job, &includes, out)?));
        }
    };
    let mut images = thread::scope(|scope| -> Result<Vec<(usize, Image)>, String> {
        let workers: Vec<_> = (0..parallelism()).map(|_| scope.spawn(worker)).collect();
        let mut images = Vec::new();
        for handle in workers {
            images.extend(handle.join().map_err(|_| "a compiling thread panicked".to_string())??);
        }
        Ok(images)
    })?;
    images.sort_by_key(|(index, _)| *index);
    let images: Vec<Image> = images.into_iter().map(|(_, image)| image).collect();
    refuse_spills(&sources, &images)?;
    Ok(table(Some(nvcc.version()), &images))
}

fn parallelism() -> usize {
    variable("NUM_JOBS").and_then(|jobs| jobs.parse().ok()).unwrap_or(1)
}

/// The `.cu` files. A new kernel also adds its module to src/kernels/mod.rs, and that is what makes cargo look again:
/// to watch the whole folder would build the program anew for every edit of a text file in it.
fn sources() -> Result<Vec<Source>, String> {
    println!("cargo:rerun-if-changed=src/kernels/mod.rs");
    let mut sources = Vec::new();
    for path in files(Path::new("cuda"), "cu")? {
        println!("cargo:rerun-if-changed={}", path.display());
        let family = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let text = read(&path)?;
        let targets = targets(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        sources.push(Source { family, path, text, targets });
    }
    Ok(sources)
}

/// Names and texts of the headers, any of which a source may include.
fn includes() -> Result<Vec<(PathBuf, String)>, String> {
    println!("cargo:rerun-if-changed=cuda/include");
    files(Path::new("cuda/include"), "cuh")?
        .into_iter()
        .map(|path| read(&path).map(|text| (path, text)))
        .collect()
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries =
        fs::read_dir(folder).map_err(|error| format!("cannot read `{}`: {error}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    paths.sort();
    Ok(paths)
}

/// Takes the image from the cache, or compiles it and puts it there.
fn compile(nvcc: &Nvcc, job: &Job<'_>, includes: &[(PathBuf, String)], out: &Path) -> Result<Image, String> {
    let name = key(nvcc, job, includes);
    let image = out.join(format!("{}.{}", job.source.family, job.target));
    let log = out.join(format!("{}.{}.log", job.source.family, job.target));
    let cache = cache_folder();
    let cached = |suffix: &str| cache.as_ref().map(|folder| folder.join(format!("{name}.{suffix}")));
    if !(copy(cached("image"), &image) && copy(cached("log"), &log)) {
        run_nvcc(nvcc, job, &image, &log)?;
        // The log first: an image in the cache has its log. A cache that cannot be written costs time, not the build.
        let _ = store(&log, cached("log")).and_then(|()| store(&image, cached("image")));
    }
    let kernels = parse_resources(&read(&log)?);
    Ok(Image { family: job.source.family.clone(), target: job.target, file: image, kernels })
}

/// The hash of everything that decides the image.
fn key(nvcc: &Nvcc, job: &Job<'_>, includes: &[(PathBuf, String)]) -> String {
    let mut hash = Sha256::new();
    let mut add = |part: &str| {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(&nvcc.banner);
    add(job.target);
    FLAGS.iter().for_each(|flag| add(flag));
    add(&job.source.text);
    for (path, text) in includes {
        add(&path.to_string_lossy());
        add(text);
    }
    hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        // Writing into a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

fn cache_folder() -> Option<PathBuf> {
    let cache = variable("GRANITE_CACHE").map(PathBuf::from).or_else(|| {
        let base = variable("XDG_CACHE_HOME").map(PathBuf::from);
        Some(base.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))?.join("granite"))
    });
    Some(cache?.join("cubins"))
}

fn run_nvcc(nvcc: &Nvcc, job: &Job<'_>, image: &Path, log: &Path) -> Result<(), String> {
    let kind = if job.target == PTX { "-ptx" } else { "-cubin" };
    let mut command = Command::new(&nvcc.path);
    command.arg(kind).arg(format!("-arch={}", job.target)).args(FLAGS).arg("-Icuda/include");
    command.arg(&job.source.path).arg("-o").arg(image);
    let said = capture(&mut command)?.1;
    if job.target == PTX {
        // The driver takes PTX as a C string.
        let mut text =
            fs::read(image).map_err(|error| format!("cannot read `{}`: {error}", image.display()))?;
        text.push(0);
        write(image, &text)?;
    }
    write(log, said.as_bytes())
}

fn copy(from: Option<PathBuf>, to: &Path) -> bool {
    from.is_some_and(|from| fs::copy(from, to).is_ok())
}

/// Puts a file into the cache by rename: another build may be reading it.
fn store(from: &Path, to: Option<PathBuf>) -> std::io::Result<()> {
    let Some(to) = to else { return Ok(()) };
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut temporary = to.clone().into_os_string();
    temporary.push(format!(".{}", std::process::id()));
    fs::copy(from, &temporary)?;
    fs::rename(&temporary, &to)
}

/// Reads the report of `ptxas -v`: what belongs to a kernel follows the line that names it.
pub fn parse_resources(log: &str) -> Vec<Resources> {
    let mut kernels: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split_once("Compiling entry function '").map(|(_, rest)| rest) {
            let name = rest.split('\'').next().unwrap_or_default().to_string();
            kernels.push(Resources { name, ..Resources::default() });
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        let set = |field: &mut u32, unit: &str| {
            if let Some(number) = number_before(line, unit) {
                *field = number;
            }
        };
        set(&mut kernel.registers, " registers");
        set(&mut kernel.spill_stores, " bytes spill stores");
        set(&mut kernel.spill_loads, " bytes spill loads");
        set(&mut kernel.shared, " bytes smem");
    }
    kernels
}

/// The number that stands before `unit`.
fn number_before(line: &str, unit: &str) -> Option<u32> {
    let (before, _) = line.split_once(unit)?;
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn refuse_spills(sources: &[Source], images: &[Image]) -> Result<(), String> {
    let allowed =
        |family: &str| sources.iter().any(|source| source.family == family && spills_allowed(&source.text));
    let spilling: Vec<String> = images
        .iter()
        .filter(|image| !allowed(&image.family))
        .flat_map(|image| image.kernels.iter().map(move |kernel| (image, kernel)))
        .filter(|(_, kernel)| kernel.spill_stores + kernel.spill_loads > 0)
        .map(|(image, kernel)| {
            format!(
                "kernel `{}` in cuda/{}.cu spills {} bytes of registers on {} ({} registers): make it smaller, or \
                 begin a line with `{SPILLS_ALLOWED}` and the reason",
                kernel.name, image.family, kernel.spill_stores, image.target, kernel.registers
            )
        })
        .collect();
    if spilling.is_empty() { Ok(()) } else { Err(spilling.join("\n")) }
}

/// Whether a source says that it may spill, and why.
pub fn spills_allowed(source: &str) -> bool {
    source
        .lines()
        .any(|line| line.strip_prefix(SPILLS_ALLOWED).is_some_and(|reason| !reason.trim().is_empty()))
}

/// What a source is compiled for: the targets that it names, each known, or all.
pub fn targets(source: &str) -> Result<Vec<&'static str>, String> {
    let all = || CUBINS.into_iter().chain([PTX]);
    let Some(named) = source.lines().find_map(|line| line.strip_prefix(TARGETS)) else {
        return Ok(all().collect());
    };
    let known = |name: &str| {
        all().find(|target| *target == name).ok_or_else(|| {
            format!("`{name}` is no target, there are {}", all().collect::<Vec<_>>().join(" "))
        })
    };
    let found = named.split_whitespace().map(known).collect::<Result<Vec<_>, _>>()?;
    if found.is_empty() { Err(format!("no target follows `{TARGETS}`")) } else { Ok(found) }
}

/// The generated source that src/kernels/images.rs includes.
fn table(nvcc: Option<&str>, images: &[Image]) -> String {
    let mut text = format!(
        "/// The compiler of the images, when there was one.\npub const NVCC: Option<&str> = {nvcc:?};\n"
    );
    let _ = write!(
        text,
        "\n/// Every source for every target that it is compiled for.\npub static IMAGES: [Image; {}] = [\n",
        images.len()
    );
    for image in images {
        let _ = writeln!(
            text,
            "    Image {{ family: {:?}, target: {:?}, bytes: include_bytes!({:?}), kernels: &[",
            image.family, image.target, image.file
        );
        for kernel in &image.kernels {
            let Resources { name, registers, spill_stores, spill_loads, shared } = kernel;
            let _ = writeln!(
                text,
                "        Resources {{ name: {name:?}, registers: {registers}, spill_stores: {spill_stores}, \
                 spill_loads: {spill_loads}, shared: {shared} }},"
            );
        }
        text.push_str("    ] },\n");
    }
    text.push_str("];\n");
    text
}

/// Runs a command and gives what it said on stdout and stderr.
fn capture(command: &mut Command) -> Result<(String, String), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("cannot run `{program}`: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    if output.status.success() {
        return Ok((stdout, stderr));
    }
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    Err(format!("`{program} {}` failed ({}):\n{stdout}{stderr}", arguments.join(" "), output.status))
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read `{}`: {error}", path.display()))
}

fn write(path: &Path, contents: &[u8]) -> Result<(), String> {
    fs::write(path, contents).map_err(|error| format!("cannot write `{}`: {error}", path.display()))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
