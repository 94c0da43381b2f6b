//! Programs that mean harm do none: each test tells what was tried, and looks whether anything came of it.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use granite::eval::sandbox::{Ending, Limits, SUBCOMMAND, Sandbox};

/// Short, because some programs here never end by themselves; long enough for a busy machine.
const TIME: Duration = Duration::from_secs(8);

fn sandbox() -> Sandbox {
    let limits = Limits { time: TIME, memory: 256 << 20 };
    Sandbox::open(Path::new(env!("CARGO_BIN_EXE_granite")), limits).unwrap()
}

/// Whether the kernel knows Landlock; where it does not, nothing is run, and nothing can be tested but that.
pub fn has_landlock() -> bool {
    let limits = Limits { time: TIME, memory: 256 << 20 };
    let opened = Sandbox::open(Path::new(env!("CARGO_BIN_EXE_granite")), limits);
    let missing = opened.is_err_and(|error| format!("{error:#}").contains("has no Landlock"));
    if missing {
        eprintln!("skipped: confined Python: the kernel or the container has no Landlock");
    }
    !missing
}

fn run(program: &str) -> Ending {
    sandbox().run(program).unwrap()
}

fn raised(program: &str) -> String {
    match run(program) {
        Ending::Raised(error) => error,
        ending => panic!("{ending:?} of\n{program}"),
    }
}

/// Processes whose command line holds `word`.
fn processes_with(word: &str) -> usize {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(word)).count()
}

#[test]
fn programs_end_as_they_end() {
    if !has_landlock() {
        return;
    }
    let sandbox = sandbox();
    let run = |program: &str| sandbox.run(program).unwrap();
    assert_eq!(run("assert sorted({3, 1, 2}) == [1, 2, 3]"), Ending::Passed);
    assert_eq!(run(""), Ending::Passed);
    assert_eq!(run("print('x' * 10_000_000)"), Ending::Passed);
    let libraries = "import math, re, json, collections, itertools, heapq, datetime, decimal, random, string, hashlib, bisect\n\
                     from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nassert P(1).x == 1\n\
                     assert hashlib.md5(b'').hexdigest().startswith('d41d')\nassert 0 <= random.random() < 1";
    assert_eq!(run(libraries), Ending::Passed);
    assert_eq!(run("assert 1 == 2, 'no'"), Ending::Raised("AssertionError: no".to_string()));
    assert!(matches!(run("def f(:"), Ending::Raised(error) if error.starts_with("SyntaxError")));
    assert!(matches!(run("\0"), Ending::Raised(_)));
    assert!(matches!(run("raise SystemExit(0)"), Ending::Raised(error) if error.starts_with("SystemExit")));
    // Leaving early is not passing, whatever was said before.
    for program in [
        "import os; os._exit(0)",
        "import os; os.write(1, b'passed\\n'); os._exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "class E(BaseException):\n    def __str__(self): raise ValueError\nraise E",
    ] {
        let ending = run(program);
        assert!(matches!(ending, Ending::Died(_) | Ending::Raised(_)), "{ending:?} of {program}");
    }
    assert_eq!(run("import sys; assert not [p for p in sys.path if 'site-packages' in p]"), Ending::Passed);
}

#[test]
fn sets_have_the_same_order_every_time() {
    if !has_landlock() {
        return;
    }
    let program = "raise ValueError(''.join({str(n) for n in range(50)}))";
    assert_eq!(raised(program), raised(program));
}

#[test]
fn endless_programs_are_stopped() {
    if !has_landlock() {
        return;
    }
    let started = Instant::now();
    for program in [
        "while True: pass",
        "import time\nwhile True: time.sleep(1)",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        // A closed output is no end.
        "import os, time\nos.close(1); os.close(2)\nwhile True: time.sleep(1)",
    ] {
        let ending = run(program);
        assert!(matches!(ending, Ending::TimedOut(_) | Ending::Died(_)), "{ending:?} of {program}");
    }
    assert!(started.elapsed() < 6 * TIME, "{:?}", started.elapsed());
}

#[test]
fn no_process_and_no_thread_is_made() {
    if !has_landlock() {
        return;
    }
    let started = Instant::now();
    let bomb = "import os\nmade = 0\nfor _ in range(10000):\n    try:\n        os.fork(); made += 1\n    except OSError: pass\nraise ValueError(made)";
    assert_eq!(raised(bomb), "ValueError: 0");
    for program in [
        "import os; os.fork()",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import os; os.execv('/bin/sh', ['sh', '-c', 'sleep 1000'])",
    ] {
        let error = raised(program);
        assert!(
            error.contains("PermissionError") || error.contains("can't start new thread"),
            "{error} of {program}"
        );
    }
    // Becoming Python again gives nothing back.
    let again =
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-S', '-c', 'import os; os.fork()'])";
    assert!(matches!(run(again), Ending::Died(_)));
    assert!(started.elapsed() < 10 * TIME);
}

#[test]
fn no_file_is_read_or_written() {
    if !has_landlock() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, "s").unwrap();
    let (path, place) = (secret.display(), folder.path().display());
    for program in [
        "open('/etc/passwd')".to_string(),
        "open('/proc/self/environ')".to_string(),
        "open('/proc/1/cmdline')".to_string(),
        "open('/dev/shm/x', 'w')".to_string(),
        "import os; os.listdir('/')".to_string(),
        format!("open('{path}')"),
        format!("open('{path}', 'w')"),
        format!("open('{path}', 'a')"),
        format!("import os; os.open('{path}', os.O_PATH); open('{path}')"),
        format!("import os; os.remove('{path}')"),
        format!("import os; os.rename('{path}', '{path}.moved')"),
        format!("import os; os.truncate('{path}', 0)"),
        format!("import os; os.chmod('{path}', 0)"),
        format!("import os; os.utime('{path}')"),
        format!("import os; os.link('{path}', '{path}.linked')"),
        format!("import os; os.symlink('{path}', '{place}/link')"),
        format!("import os; os.mkdir('{place}/folder')"),
        format!("import os; os.mkfifo('{place}/pipe')"),
        "import os; open(os.__file__, 'a')".to_string(),
        "import shutil, os; os.rmdir(os.path.dirname(os.__file__))".to_string(),
        "import tempfile; tempfile.mkdtemp()".to_string(),
        "import os; os.memfd_create('x')".to_string(),
        "import os; os.chroot('/')".to_string(),
        // The file that the program came in has no name and cannot be written.
        "import os; os.write(0, b'x'); raise PermissionError".to_string(),
    ] {
        let error = raised(&program);
        let refused = ["PermissionError", "FileNotFoundError: [Errno 2] No usable temporary directory"];
        assert!(refused.iter().any(|one| error.starts_with(one)), "{error} of {program}");
    }
    assert_eq!(fs::read_to_string(&secret).unwrap(), "s");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn the_network_is_out_of_reach() {
    if !has_landlock() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    for program in [
        format!("import socket; socket.create_connection(('127.0.0.1', {port}), 2)"),
        format!("import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')"),
        "import socket; socket.socket(socket.AF_UNIX)".to_string(),
        "import socket; socket.socketpair()".to_string(),
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)".to_string(),
    ] {
        let error = raised(&program);
        assert!(
            error.contains("not permitted") || error.contains("Permission denied"),
            "{error} of {program}"
        );
    }
    assert!(listener.accept().is_err(), "nobody may have called");
}

#[test]
fn no_other_process_is_reached() {
    if !has_landlock() {
        return;
    }
    let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = bystander.id();
    for program in [
        "import os; os.kill(os.getppid(), 9)".to_string(),
        format!("import os; os.kill({pid}, 9)"),
        "import os; os.killpg(0, 9)".to_string(),
        "import os; os.kill(-1, 9)".to_string(),
        format!("import resource; resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))"),
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))".to_string(),
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)".to_string(),
        "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, 1)".to_string(),
        "import fcntl; fcntl.ioctl(0, 0x5412, b'x')".to_string(),
        "import ctypes\nif ctypes.CDLL(None).syscall(101, 16, 1, 0, 0) < 0: raise PermissionError"
            .to_string(),
    ] {
        let error = raised(&program);
        let refused = ["PermissionError", "ValueError: not allowed to raise maximum limit"];
        assert!(refused.iter().any(|one| error.starts_with(one)), "{error} of {program}");
    }
    assert!(bystander.try_wait().unwrap().is_none(), "the bystander lives");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

#[test]
fn memory_and_output_are_bounded() {
    if !has_landlock() {
        return;
    }
    for program in
        ["x = bytearray(1 << 34)", "x = []\nwhile True: x.append(' ' * 1_000_000)", "x = '9' * (1 << 40)"]
    {
        assert!(raised(program).starts_with("MemoryError"), "{program}");
    }
    let flood = "import os\nwhile True: os.write(1, b'x' * 4096)";
    assert_eq!(run(flood), Ending::TooMuchOutput);
    assert!(raised("def f(): f()\nf()").starts_with("RecursionError"));
}

#[test]
fn nothing_stays_behind() {
    if !has_landlock() {
        return;
    }
    let word = "a-word-that-no-other-process-has";
    let program = format!(
        "import os, sys, time\nos.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(1000)', '{word}'])"
    );
    assert_eq!(run(&program), Ending::TimedOut(TIME));
    assert_eq!(processes_with(word), 0);
}

#[test]
fn where_nothing_protects_nothing_runs() {
    let granite = env!("CARGO_BIN_EXE_granite");
    let none = Command::new(granite).args([SUBCOMMAND, "{}"]).output().unwrap();
    assert!(!none.status.success());
    // A helper that confines nothing is found out before the first program.
    let folder = tempfile::tempdir().unwrap();
    let lax = folder.path().join("lax");
    let harness = concat!(env!("CARGO_MANIFEST_DIR"), "/src/eval/sandbox/harness.py");
    fs::write(&lax, format!("#!/bin/sh\nexec python3 -S '{harness}'\n")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&lax, mode).unwrap();
    let error = Sandbox::open(&lax, Limits { time: TIME, memory: 1 << 30 }).unwrap_err();
    let text = granite::error::render(&error);
    assert!(text.contains("within reach: ") && text.contains("a file") && text.contains("hint: "), "{text}");
}
