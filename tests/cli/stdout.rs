//! Where answers go.

use std::fs::File;
use std::io::pipe;
use std::process::{Command, Output, Stdio};

fn doctor(stdout: impl Into<Stdio>) -> Output {
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_granite"));
    doctor.arg("doctor").env("CUDA_VISIBLE_DEVICES", "").stdout(stdout).output().unwrap()
}

/// As `granite doctor | head -1`, whose `head` may have ended before anything was written.
#[test]
fn a_reader_that_is_gone_is_no_error() {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let output = doctor(writer);
    let listened_to = doctor(Stdio::null());
    assert_eq!(output.status.code(), listened_to.status.code());
    assert_eq!(String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&listened_to.stderr));
}

#[test]
fn a_full_disk_is_one() {
    let output = doctor(File::options().write(true).open("/dev/full").unwrap());
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("error: cannot write to stdout") && told.contains("No space left"), "{told}");
}
