//! `granite doctor`: what this machine has, what is wrong with it, and the next step.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use serde::Serialize;
use sysinfo::{Disks, System};
use tch::{Device, Kind, Tensor};

use crate::cli::DoctorArgs;
use crate::error::user_error;
use crate::kernels::bitsandbytes::{self, CpuLibrary, CudaLibrary, LIBRARIES};
use crate::kernels::check::{self, Check, Selection};
use crate::kernels::device::{self, CudaError};
use crate::kernels::driver::{self, Driver, NoGpu};
use crate::kernels::gpu::Gpu;
use crate::kernels::images::{self, IMAGES, NVCC};
use crate::kernels::libtorch::{self, Libtorch};
use crate::model::fused::check::against_twins;
use crate::stdout;

/// What libtorch tch was written for.
const LIBTORCH: &str = "2.11.";

/// Below this even a small model does not fit beside its optimiser.
const LITTLE_MEMORY: u64 = 4 << 30;

/// Below this a base model of 8 billion weights in 4 bits and its checkpoints do not fit.
const LITTLE_DISK: u64 = 10 << 30;

/// Runs the subcommand: findings on stdout.
///
/// # Errors
/// When something is wrong, or `--kernels` is given and a kernel fails or there is no GPU to run it on, or `--only` names
/// no check.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let libtorch = libtorch::loaded();
    let folders =
        bitsandbytes::folders(args.bitsandbytes.as_deref(), libtorch.as_ref().map(|it| it.folder.as_path()));
    let mut findings = vec![processor(), memory(), libtorch_finding(libtorch.as_ref())];
    let (gpu, device) = gpus();
    findings.extend(gpu);
    findings.push(kernels());
    findings.push(bitsandbytes_finding(&folders, device.is_some()));
    findings.extend(disks());
    findings
        .push(Finding::ok("network", "not needed: only a hub name as the base model would be downloaded"));
    if args.kernels {
        let selection = Selection { only: args.only.clone(), short: args.short };
        findings.extend(check_kernels(device, &folders, &selection)?);
    }
    print(&findings, args.json)?;
    match findings.iter().filter(|finding| finding.status == Status::Problem).count() {
        0 => Ok(()),
        1 => bail!("the doctor found a problem"),
        problems => bail!("the doctor found {problems} problems"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warning,
    Problem,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding {
    subject: String,
    status: Status,
    found: String,
    /// The next step, where there is one.
    next: Option<String>,
}

impl Finding {
    fn new(status: Status, subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self { subject: subject.into(), status, found: found.into(), next: None }
    }

    fn ok(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Status::Ok, subject, found)
    }

    fn warning(subject: impl Into<String>, found: impl Into<String>, next: impl Into<String>) -> Self {
        Self { next: Some(next.into()), ..Self::new(Status::Warning, subject, found) }
    }

    fn problem(subject: impl Into<String>, found: impl Into<String>, next: impl Into<String>) -> Self {
        Self { next: Some(next.into()), ..Self::new(Status::Problem, subject, found) }
    }
}

fn processor() -> Finding {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let brand = System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_cpu(sysinfo::CpuRefreshKind::nothing()),
    )
    .ok()
    .and_then(|system| system.cpus().first().map(|cpu| cpu.brand().trim().to_string()))
    .filter(|brand| !brand.is_empty())
    .unwrap_or_else(|| "unknown processor".to_string());
    let cores =
        System::physical_core_count().map_or_else(|_| String::new(), |cores| format!("{cores} cores, "));
    let found = format!("{brand}, {cores}{threads} threads, {}", libtorch::vectors());
    if libtorch::cpu_kernels() == "default" {
        return Finding::warning("processor", found, "without AVX2 everything is several times slower");
    }
    Finding::ok("processor", found)
}

fn memory() -> Finding {
    let refresh = sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::everything());
    let Ok(system) = System::new_with_specifics(refresh) else {
        return Finding::warning("memory", "the system does not say", "mind the size of the model");
    };
    // A container may be allowed less than the machine has.
    let limits = system.cgroup_limits();
    let total = limits.as_ref().map_or(u64::MAX, |limits| limits.total_memory).min(system.total_memory());
    let free = limits.as_ref().map_or(u64::MAX, |limits| limits.free_memory).min(system.available_memory());
    let found = format!("{}, {} available", gib(total), gib(free));
    if free < LITTLE_MEMORY {
        return Finding::warning("memory", found, "close other programs, or use a small model");
    }
    Finding::ok("memory", found)
}

fn libtorch_finding(libtorch: Option<&Libtorch>) -> Finding {
    let running = format!("{} kernels on {} threads", libtorch::cpu_kernels(), tch::get_num_threads());
    let Some(Libtorch { folder, version }) = libtorch else {
        return Finding::ok("libtorch", running);
    };
    let told = version.as_deref().unwrap_or("of unknown version");
    let found = format!("{told} from {}, {running}", folder.display());
    match version {
        Some(version) if version.starts_with(LIBTORCH) => Finding::ok("libtorch", found),
        Some(_) => Finding::problem(
            "libtorch",
            found,
            format!("use a torch {LIBTORCH}x: results would be undefined"),
        ),
        None => Finding::warning("libtorch", found, format!("make sure that it is {LIBTORCH}x")),
    }
}

/// The driver, each GPU, and the device when libtorch and our kernels can use it.
fn gpus() -> (Vec<Finding>, Option<Device>) {
    let driver = match driver::probe() {
        Ok(driver) => driver,
        Err(error) => return (vec![no_gpu(&error)], None),
    };
    let (major, minor) = driver.cuda;
    let mut findings = vec![Finding::ok("driver", format!("runs CUDA up to {major}.{minor}"))];
    let device = match device::cuda() {
        Ok(device) => Some(device),
        Err(error) => {
            findings.push(Finding::problem("libtorch CUDA", error.to_string(), error.hint()));
            None
        }
    };
    findings.extend(driver.gpus.iter().enumerate().map(|(index, _)| gpu(&driver, index, device.is_some())));
    if let Some(device) = device {
        findings.push(libtorch_cuda(device));
    }
    (findings, device)
}

fn no_gpu(error: &NoGpu) -> Finding {
    let hint = CudaError::NoGpu(error.clone()).hint();
    match error {
        NoGpu::Failed(_) => Finding::problem("GPU", error.to_string(), hint),
        NoGpu::NoDriver | NoGpu::NoDevice => {
            Finding::warning("GPU", format!("{error}: everything computes on the processor"), hint)
        }
    }
}

fn gpu(driver: &Driver, index: usize, usable: bool) -> Finding {
    let info = &driver.gpus[index];
    let (major, minor) = info.capability;
    let free = if usable { Gpu::at(index).and_then(|gpu| gpu.memory()).ok() } else { None };
    let free = free.map_or_else(String::new, |(free, _)| format!(" ({} free)", gib(free as u64)));
    let found =
        format!("{}, {}{free}, compute capability {major}.{minor}", info.name, gib(info.memory as u64));
    let subject = format!("GPU {index}");
    let mut targets: Vec<&str> = images::families()
        .into_iter()
        .filter_map(|family| images::fitting(&IMAGES, family, info.capability))
        .map(|image| image.target)
        .collect();
    targets.dedup();
    if targets.is_empty() {
        return Finding::problem(
            subject,
            format!("{found}; no kernel of ours runs on it"),
            "use an A100, RTX 30 or newer",
        );
    }
    Finding::ok(subject, format!("{found}; kernels for {}", targets.join(" and ")))
}

/// A product on the GPU: it needs cuBLAS, which is loaded only now.
fn libtorch_cuda(device: Device) -> Finding {
    let product = || -> Result<f64, tch::TchError> {
        let x = Tensor::f_arange(256 * 256, (Kind::Float, device))?.f_remainder(7.0)?.f_view([256, 256])?;
        let on_gpu =
            x.f_to_kind(Kind::BFloat16)?.f_matmul(&x.f_to_kind(Kind::BFloat16)?)?.f_to_kind(Kind::Float)?;
        let x = x.f_to_device(Device::Cpu)?;
        let wanted = x.f_matmul(&x)?.f_to_kind(Kind::BFloat16)?.f_to_kind(Kind::Float)?;
        (on_gpu.f_to_device(Device::Cpu)? - wanted).f_abs()?.f_max()?.f_double_value(&[])
    };
    let version = tch::utils::version_cudart();
    let version = format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
    let next = "put the folders of torch and of each `nvidia/*/lib` on LD_LIBRARY_PATH";
    match product() {
        // Whole numbers whose sums f32 holds: both sides round the same value.
        Ok(0.0) => Finding::ok("libtorch CUDA", format!("{version}, a product agrees with the processor's")),
        Ok(difference) => {
            Finding::problem("libtorch CUDA", format!("{version}, a product is off by {difference}"), next)
        }
        Err(error) => Finding::problem("libtorch CUDA", first_line(&error.to_string()), next),
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_string()
}

fn kernels() -> Finding {
    let Some(nvcc) = NVCC else {
        return Finding::warning(
            "kernels",
            "none: this program was built without nvcc",
            "build it where scripts/setup has installed nvcc, to compute on a GPU",
        );
    };
    Finding::ok("kernels", format!("{}, nvcc {nvcc}", images::inventory()))
}

fn bitsandbytes_finding(folders: &[PathBuf], on_gpu: bool) -> Finding {
    let [cpu, cuda] = LIBRARIES.map(|library| bitsandbytes::find(folders, library));
    let opened =
        [cpu.as_deref().map(|file| CpuLibrary::open(file).map(drop)), cuda_library(cuda.as_deref(), on_gpu)];
    let next = "name their folder with `--bitsandbytes`; scripts/setup and the bundle have them";
    if let Some(error) = opened.into_iter().flatten().find_map(Result::err) {
        return Finding::warning("bitsandbytes", format!("{error:#}"), next);
    }
    let found: Vec<String> = [cpu, cuda].iter().flatten().map(|file| file.display().to_string()).collect();
    if found.is_empty() {
        return Finding::warning("bitsandbytes", "not found; only cross-checks of NF4 need it", next);
    }
    Finding::ok("bitsandbytes", found.join(", "))
}

/// The CUDA library opens only beside libtorch's CUDA half; without a GPU it is enough that it is there.
fn cuda_library(file: Option<&Path>, on_gpu: bool) -> Option<Result<()>> {
    file.map(|file| if on_gpu { CudaLibrary::open(file).map(drop) } else { Ok(()) })
}

fn disks() -> Vec<Finding> {
    let Ok(disks) = Disks::new_with_refreshed_list() else { return Vec::new() };
    let mut findings: Vec<Finding> = Vec::new();
    let mut seen = Vec::new();
    for folder in [".", "checkpoints"] {
        let Ok(path) = Path::new(folder).canonicalize() else { continue };
        // The disk of a path is the one mounted nearest above it.
        let disks = disks.iter().filter(|disk| path.starts_with(disk.mount_point()));
        let Some(disk) = disks.max_by_key(|disk| disk.mount_point().as_os_str().len()) else { continue };
        if seen.contains(&disk.mount_point()) {
            continue;
        }
        seen.push(disk.mount_point());
        let free = disk.available_space();
        let found = format!("{} free in {}", gib(free), path.display());
        findings.push(if free < LITTLE_DISK {
            Finding::warning("disk", found, "a base model and its checkpoints may not fit")
        } else {
            Finding::ok("disk", found)
        });
    }
    findings
}

/// All kernels together: a small model's losses and gradients.
const TRAINING_PASSES: &str = "training passes";

fn check_kernels(device: Option<Device>, folders: &[PathBuf], selection: &Selection) -> Result<Vec<Finding>> {
    let mut names = check::names();
    names.push(TRAINING_PASSES);
    if let Some(unknown) = selection.unknown(&names) {
        return Err(user_error(
            format!("no check's name begins with `{unknown}`"),
            format!("name one of: {}", names.join("; ")),
        ));
    }
    let Some(device) = device else {
        let found = "not run: there is no GPU to run the kernels on";
        return Ok(vec![Finding::problem("kernel checks", found, "run this where there is one")]);
    };
    // Other inputs every time; the seed is told, so that a failure can be made again.
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| i64::from(time.subsec_nanos()));
    let library = bitsandbytes::find(folders, LIBRARIES[1]).and_then(|file| CudaLibrary::open(&file).ok());
    let made = check::run(device, seed, library.as_ref(), selection);
    let mut findings: Vec<Finding> = made.into_iter().map(|check| checked(check, seed)).collect();
    if selection.takes(TRAINING_PASSES) {
        findings.push(fused_passes(device, seed));
    }
    Ok(findings)
}

fn fused_passes(device: Device, seed: i64) -> Finding {
    match against_twins(device) {
        Ok(cases) => Finding::ok(TRAINING_PASSES, format!("within tolerance in {cases} cases")),
        Err(error) => Finding::problem(
            TRAINING_PASSES,
            format!("differ from their twins (seed {seed}): {error:#}"),
            "please report this",
        ),
    }
}

fn checked(check: Check, seed: i64) -> Finding {
    let Check { name, cases, exact, failure, bandwidth } = check;
    if let Some(failure) = failure {
        return Finding::problem(
            name,
            format!("differs from its twin (seed {seed}): {failure}"),
            "please report this",
        );
    }
    let bandwidth = bandwidth.map_or_else(String::new, |rate| format!(", {rate:.0} GB/s"));
    let agreement = if exact { "equal bit for bit" } else { "within tolerance" };
    Finding::ok(name, format!("{agreement} in {cases} cases{bandwidth}"))
}

fn print(findings: &[Finding], json: bool) -> Result<()> {
    if json {
        let worst = [Status::Problem, Status::Warning].into_iter();
        let worst = worst.into_iter().find(|status| findings.iter().any(|finding| finding.status == *status));
        let report = serde_json::json!({ "status": worst.unwrap_or(Status::Ok), "findings": findings });
        return stdout::json(&report);
    }
    // Writing into a String cannot fail.
    let mut text = String::new();
    let width = findings.iter().map(|finding| finding.subject.chars().count()).max().unwrap_or(0);
    for Finding { subject, status, found, next } in findings {
        let status = match status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Problem => "problem",
        };
        let _ = writeln!(text, "{status:<8} {subject:<width$}  {found}");
        if let Some(next) = next {
            let _ = writeln!(text, "{:<8} {:<width$}  next: {next}", "", "");
        }
    }
    stdout::text(&text)
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}
