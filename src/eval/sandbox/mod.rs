//! Running Python that a model wrote, so that it can harm nothing.
//!
//! Each program runs in a process of its own, the user's `python3`, which has given up nearly everything before
//! it reads the program: Landlock lets it open Python's own library and nothing else, a seccomp filter lets it
//! make the system calls of a computation and no others (no process, no thread, no signal, no socket), and limits
//! bound its time, memory and output. None of this needs privileges. Where the kernel offers no such protection
//! nothing runs: [`Sandbox::open`] says why. What stays visible is whether a path exists, and how large it is.
//!
//! The program shares its interpreter with the harness that reports its end, so one that was written to cheat
//! the harness could claim to have passed; it could not reach anything else.

pub mod confine;
mod interpreter;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io::{PipeReader, Read as _, Seek as _, Write as _, pipe};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use self::confine::Confinement;
use crate::error::with_hint;

/// The hidden subcommand that confines itself and becomes Python.
pub const SUBCOMMAND: &str = "confined-python";

/// Bytes that a program may say; its prints are not among them, they go nowhere.
const OUTPUT_BYTES: usize = 64 << 10;

/// Between two looks at the process.
const LOOK: Duration = Duration::from_millis(5);

/// What a program may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest run by the clock on the wall, Python's start included.
    pub time: Duration,
    /// Most address space in bytes.
    pub memory: u64,
}

impl Default for Limits {
    /// Fifteen seconds and 1 GiB: the slowest reference solution of HumanEval takes two seconds.
    fn default() -> Self {
        Self { time: Duration::from_secs(15), memory: 1 << 30 }
    }
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It ran to its end.
    Passed,
    /// It raised: type and message.
    Raised(String),
    /// It took too long.
    TimedOut(Duration),
    /// It said too much.
    TooMuchOutput,
    /// The process ended without a word: killed by a signal, or by itself.
    Died(String),
}

impl Ending {
    /// Why it did not pass.
    pub fn failure(&self) -> Option<String> {
        match self {
            Self::Passed => None,
            Self::Raised(error) => Some(error.clone()),
            Self::TimedOut(time) => Some(format!("longer than {} s", time.as_secs_f64())),
            Self::TooMuchOutput => Some(format!("more than {OUTPUT_BYTES} bytes of output")),
            Self::Died(how) => Some(how.clone()),
        }
    }
}

/// A place to run programs, checked to hold.
#[derive(Debug)]
pub struct Sandbox {
    helper: PathBuf,
    confinement: String,
    limits: Limits,
    version: String,
}

impl Sandbox {
    /// Finds the user's Python and makes sure that a program in it can reach nothing; `helper` is this program.
    ///
    /// # Errors
    /// When there is no Python, the kernel cannot confine it, or a check finds something within reach.
    pub fn open(helper: &Path, limits: Limits) -> Result<Self> {
        let python = interpreter::find()?;
        let confinement = Confinement {
            python: python.executable.clone(),
            folders: python.folders,
            libraries: python.libraries,
            cpu_seconds: limits.time.as_secs().max(1),
            memory: limits.memory,
        };
        let confinement = serde_json::to_string(&confinement)?;
        let sandbox = Self { helper: helper.to_path_buf(), confinement, limits, version: python.version };
        sandbox.check().map_err(|error| {
            with_hint(
                error.context(format!("cannot confine `{}`: no program is run", python.executable.display())),
                "code is only run on Linux 5.13 or newer with Landlock and seccomp, which a container's own \
                 profile may forbid; leave `eval.humaneval` and `eval.mbpp` out to go on without",
            )
        })?;
        Ok(sandbox)
    }

    /// The version of Python that runs the programs.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Runs a program to its end or its limits.
    ///
    /// # Errors
    /// When no process can be started; what the program does is an [`Ending`].
    pub fn run(&self, program: &str) -> Result<Ending> {
        Ok(self.attempt(program)?.0)
    }

    /// As [`run`](Self::run), with what the process said.
    fn attempt(&self, program: &str) -> Result<(Ending, String)> {
        let token = token();
        let (output, process) = self.start(&token, program)?;
        let (status, said) = self.watch(output, process)?;
        let ending = match (said, status) {
            (None, _) => (Ending::TooMuchOutput, String::new()),
            (Some(said), None) => (Ending::TimedOut(self.limits.time), said),
            (Some(said), Some(status)) => {
                let ending = told(&said, &token).unwrap_or(Ending::Died(status));
                (ending, said)
            }
        };
        Ok(ending)
    }

    fn start(&self, token: &str, program: &str) -> Result<(PipeReader, Killed)> {
        // A file without a name: a pipe would have to be fed while the process is watched.
        let mut input = tempfile::tempfile().context("cannot make a temporary file")?;
        write!(input, "{token}\n{program}").context("cannot write a temporary file")?;
        input.rewind().context("cannot read a temporary file")?;
        let (reader, writer) = pipe().context("cannot make a pipe")?;
        let mut command = Command::new(&self.helper);
        command.arg(SUBCOMMAND).arg(&self.confinement);
        command.stdin(input).stdout(writer.try_clone().context("cannot make a pipe")?).stderr(writer);
        let process = command.spawn().with_context(|| format!("cannot start `{}`", self.helper.display()))?;
        Ok((reader, Killed(process)))
    }

    /// Waits for the end: how the process ended, `None` when it had to be stopped; and what it said, `None` when
    /// that was too much.
    fn watch(&self, output: PipeReader, mut process: Killed) -> Result<(Option<String>, Option<String>)> {
        let deadline = Instant::now() + self.limits.time;
        let flooded = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&flooded);
        let listener = std::thread::spawn(move || listen(output, &theirs));
        let status = loop {
            if let Some(status) = process.0.try_wait().context("cannot wait for Python")? {
                break Some(status.to_string());
            }
            if Instant::now() > deadline || flooded.load(Ordering::Relaxed) {
                break None;
            }
            std::thread::sleep(LOOK);
        };
        // The pipe's last writer ends here, and with it the listener.
        drop(process);
        let said = listener.join().map_err(|_| anyhow!("the thread that reads Python's output failed"))?;
        Ok((status, (!flooded.load(Ordering::Relaxed)).then_some(said)))
    }

    /// A program that reaches for what must be out of reach.
    fn check(&self) -> Result<()> {
        let canary = tempfile::NamedTempFile::new().context("cannot make a temporary file")?;
        let path = canary.path().to_str().context("the temporary folder's path is not UTF-8")?;
        let program = format!("CANARY = {path:?}\n{}", include_str!("reach.py"));
        match self.attempt(&program)? {
            (Ending::Passed, _) => Ok(()),
            (ending, said) => {
                let failure = ending.failure().unwrap_or_default();
                let reason = if said.contains("error:") { said.trim() } else { &failure };
                Err(anyhow!("{reason}"))
            }
        }
    }
}

/// A process that does not outlive its owner. It can have no children: the filter denies them.
#[derive(Debug)]
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // An error means that it has ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn listen(mut output: PipeReader, flooded: &AtomicBool) -> String {
    let mut said = Vec::new();
    let mut limited = output.by_ref().take(OUTPUT_BYTES as u64 + 1);
    // A pipe that cannot be read has said what it has.
    let _ = limited.read_to_end(&mut said);
    flooded.store(said.len() > OUTPUT_BYTES, Ordering::Relaxed);
    String::from_utf8_lossy(&said).into_owned()
}

/// The harness's last line; a program cannot know how it begins without looking for it.
fn told(said: &str, token: &str) -> Option<Ending> {
    let verdict = said.lines().rev().find_map(|line| line.strip_prefix(token))?.trim_start();
    match verdict.split_once(' ') {
        None if verdict == "passed" => Some(Ending::Passed),
        Some(("raised", error)) => Some(Ending::Raised(error.to_string())),
        _ => None,
    }
}

fn token() -> String {
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_harness_tells_the_end() {
        assert_eq!(told("passed\nabc passed\n", "abc"), Some(Ending::Passed));
        assert_eq!(told("\nabc raised E: x y\n", "abc"), Some(Ending::Raised("E: x y".to_string())));
        assert_eq!(told("passed\n", "abc"), None);
        assert_eq!(told("", "abc"), None);
        assert_eq!(told("abc passed too", "abc"), None);
        assert_ne!(token(), token());
    }
}
