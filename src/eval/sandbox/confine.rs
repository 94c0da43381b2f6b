//! Inside the new process: give everything up, then become Python.

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// What is left to the program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confinement {
    /// The interpreter.
    pub python: PathBuf,
    /// Folders that may be read.
    pub folders: Vec<PathBuf>,
    /// Files that may be read and executed.
    pub libraries: Vec<PathBuf>,
    /// Longest run in seconds of computation.
    pub cpu_seconds: u64,
    /// Most address space in bytes.
    pub memory: u64,
}

/// Confines this process and turns it into Python; comes back only with an error.
///
/// # Errors
/// When any protection cannot be had: nothing was run then.
#[cfg(target_os = "linux")]
pub fn become_python(confinement: &Confinement) -> Result<std::convert::Infallible> {
    linux::become_python(confinement)
}

/// Confines this process and turns it into Python; comes back only with an error.
///
/// # Errors
/// Always: only Linux can be asked for this.
#[cfg(not(target_os = "linux"))]
pub fn become_python(_: &Confinement) -> Result<std::convert::Infallible> {
    anyhow::bail!("a process can only be confined on Linux")
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::BTreeMap;
    use std::convert::Infallible;
    use std::os::unix::process::CommandExt as _;
    use std::path::Path;
    use std::process::Command;

    use anyhow::{Context as _, Result, bail};
    use landlock::{
        ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
        RulesetCreated, RulesetCreatedAttr as _, RulesetStatus, Scope,
    };
    use rustix::process::{Resource, Rlimit, Signal, setrlimit};
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule,
    };

    use super::Confinement;

    /// The newest rights that are denied where the kernel knows them.
    const RIGHTS: ABI = ABI::V6;
    /// What else the loader and Python open when they start.
    const STARTING: [&str; 1] = ["/etc/ld.so.cache"];

    pub(super) fn become_python(confinement: &Confinement) -> Result<Infallible> {
        // Nothing may stay behind when `granite eval` is killed.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .context("cannot tie the process to its parent")?;
        std::env::set_current_dir("/").context("cannot leave the working folder")?;
        set_limits(confinement)?;
        let filter = filter()?;
        restrict_files(confinement)?;
        seccompiler::apply_filter(&filter).context("the kernel or the container forbids seccomp filters")?;
        let error = Command::new(&confinement.python)
            // No site packages, no byte code written.
            .args(["-s", "-S", "-B", "-c", include_str!("harness.py")])
            .env_clear()
            // The same hashes, so the same order of sets, in every run; texts are UTF-8 whatever the locale.
            .envs([("PYTHONHASHSEED", "0"), ("PYTHONUTF8", "1"), ("LC_ALL", "C.UTF-8"), ("TZ", "UTC")])
            .exec();
        Err(error).with_context(|| format!("cannot start `{}`", confinement.python.display()))
    }

    fn set_limits(confinement: &Confinement) -> Result<()> {
        let limits = [
            (Resource::Cpu, confinement.cpu_seconds),
            (Resource::As, confinement.memory),
            (Resource::Fsize, 0),
            (Resource::Core, 0),
            (Resource::Nproc, 0),
            (Resource::Nofile, 64),
            (Resource::Memlock, 0),
            (Resource::Msgqueue, 0),
        ];
        for (resource, limit) in limits {
            setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })
                .with_context(|| format!("cannot limit {resource:?} to {limit}"))?;
        }
        Ok(())
    }

    fn restrict_files(confinement: &Confinement) -> Result<()> {
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(RIGHTS))?
            .handle_access(AccessNet::from_all(RIGHTS))?
            .scope(Scope::from_all(RIGHTS))?
            .create()?;
        let reading = AccessFs::ReadFile | AccessFs::ReadDir;
        for folder in &confinement.folders {
            rules = allow(rules, folder, reading)?;
        }
        let running = AccessFs::ReadFile | AccessFs::Execute;
        for file in confinement.libraries.iter().chain([&confinement.python]) {
            rules = allow(rules, file, running)?;
        }
        rules = allow(rules, Path::new("/dev/null"), AccessFs::ReadFile | AccessFs::WriteFile)?;
        for file in STARTING.map(Path::new).into_iter().filter(|file| file.exists()) {
            rules = allow(rules, file, AccessFs::ReadFile.into())?;
        }
        let status = rules.restrict_self()?;
        if status.ruleset == RulesetStatus::NotEnforced || !status.no_new_privs {
            bail!("the kernel or the container has no Landlock, which keeps files out of reach");
        }
        Ok(())
    }

    fn allow(rules: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated> {
        let place = PathFd::new(path).with_context(|| format!("cannot open `{}`", path.display()))?;
        Ok(rules.add_rule(PathBeneath::new(place, access))?)
    }

    /// What a computation asks of the kernel: memory, reading, the clock. Everything else is "not permitted",
    /// which Python raises as an error.
    const ALLOWED: &[i64] = &[
        // Memory.
        libc::SYS_brk,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        // Files, as far as Landlock lets them be opened.
        libc::SYS_openat,
        libc::SYS_close,
        libc::SYS_close_range,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_pread64,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_lseek,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_readlinkat,
        libc::SYS_getdents64,
        libc::SYS_getcwd,
        libc::SYS_dup,
        libc::SYS_dup3,
        libc::SYS_ppoll,
        libc::SYS_pselect6,
        // The process itself; it becomes Python by `execve`, of what Landlock lets it execute.
        libc::SYS_execve,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        libc::SYS_set_tid_address,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_futex,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_getppid,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getegid,
        libc::SYS_getrusage,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        // The machine, the clock, chance.
        libc::SYS_uname,
        libc::SYS_sysinfo,
        libc::SYS_clock_gettime,
        libc::SYS_clock_getres,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_gettimeofday,
        libc::SYS_times,
        libc::SYS_getrandom,
    ];

    /// Older forms of the same, which other architectures never had.
    #[cfg(target_arch = "x86_64")]
    const OLDER: &[i64] = &[
        libc::SYS_open,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_access,
        libc::SYS_readlink,
        libc::SYS_dup2,
        libc::SYS_poll,
        libc::SYS_select,
        libc::SYS_arch_prctl,
        libc::SYS_getrlimit,
        libc::SYS_time,
    ];
    #[cfg(not(target_arch = "x86_64"))]
    const OLDER: &[i64] = &[];

    fn filter() -> Result<BpfProgram> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
            ALLOWED.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
        // Questions about a terminal and flags of a descriptor, but no signals by way of them.
        rules.insert(libc::SYS_ioctl, second_is(&[libc::TCGETS, libc::TIOCGWINSZ, libc::FIOCLEX])?);
        let descriptor = [libc::F_DUPFD, libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL];
        rules.insert(libc::SYS_fcntl, second_is(&descriptor.map(|one| one as u64))?);
        // Limits may be asked for, not set.
        let asks = [
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 0)?,
            SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?,
        ];
        rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(asks.to_vec())?]);
        let architecture = std::env::consts::ARCH.try_into().context("no filter for this processor")?;
        let refusal = SeccompAction::Errno(libc::EPERM as u32);
        Ok(SeccompFilter::new(rules, refusal, SeccompAction::Allow, architecture)?.try_into()?)
    }

    fn second_is(values: &[u64]) -> Result<Vec<SeccompRule>> {
        let rule = |value: &u64| {
            let equal = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
            Ok(SeccompRule::new(vec![equal])?)
        };
        values.iter().map(rule).collect()
    }
}
