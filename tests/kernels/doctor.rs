//! `granite doctor` on the machine at hand.

use std::process::{Command, Output};

use granite::kernels::device;
use serde_json::Value;

fn doctor(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_granite"));
    command.arg("doctor").args(arguments).output().expect("the program starts")
}

fn findings(output: &Output) -> Vec<Value> {
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON on stdout");
    report["findings"].as_array().expect("a list").clone()
}

fn statuses<'a>(findings: &'a [Value], subject: &str) -> Vec<&'a str> {
    let of_subject = findings.iter().filter(|finding| finding["subject"] == subject);
    of_subject.filter_map(|finding| finding["status"].as_str()).collect()
}

#[test]
fn reports_what_the_program_runs_on() {
    let output = doctor(&["--json"]);
    let findings = findings(&output);
    for subject in ["processor", "memory", "libtorch", "kernels", "bitsandbytes", "network"] {
        assert_eq!(statuses(&findings, subject).len(), 1, "{subject} in {findings:#?}");
    }
    assert_eq!(statuses(&findings, "libtorch"), ["ok"]);
    let problems = findings.iter().filter(|finding| finding["status"] == "problem").count();
    assert_eq!(output.status.code(), Some(i32::from(problems > 0)), "{findings:#?}");
    for finding in &findings {
        // Whatever is wrong comes with the next step.
        assert_eq!(finding["status"] == "ok", finding["next"].is_null(), "{finding:#?}");
    }
}

#[test]
fn kernels_are_run_or_said_not_to_be() {
    let output = doctor(&["--kernels"]);
    let told = String::from_utf8_lossy(&output.stdout);
    if device::cuda().is_ok() {
        assert_eq!(output.status.code(), Some(0), "{told}");
        assert!(told.contains("ok       dropout_bf16"), "{told}");
    } else {
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("problem  kernel checks"), "{told}");
        assert!(told.contains("not run: there is no GPU to run the kernels on"), "{told}");
    }
}

#[test]
fn a_folder_without_bitsandbytes_is_a_warning() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().to_str().expect("UTF-8");
    assert_eq!(
        statuses(&findings(&doctor(&["--json", "--bitsandbytes", path])), "bitsandbytes"),
        ["warning"]
    );
    // A file that is no library.
    std::fs::write(folder.path().join("libbitsandbytes_cpu.so"), "no").expect("written");
    let findings = findings(&doctor(&["--json", "--bitsandbytes", path]));
    assert_eq!(statuses(&findings, "bitsandbytes"), ["warning"]);
}
