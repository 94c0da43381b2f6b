//! The same choices give the same bytes, however the run is cut.

use serde_json::Value;

use crate::bench::{Bench, assert_told};

#[test]
fn two_runs_and_a_run_in_two_parts_are_one_run() {
    let bench = Bench::new();
    for optimizer in ["adamw", "adamw_8bit"] {
        let setting = format!("train.optimizer={optimizer}");
        let names = ["one", "two", "parts"].map(|name| format!("{name}-{optimizer}"));
        for name in &names[..2] {
            bench.ok("train", &["--set", &setting, "--out", name]);
        }
        let summary =
            bench.ok("train", &["--set", &setting, "--out", &names[2], "--stop-after", "3", "--json"]);
        let summary: Value = serde_json::from_str(&summary).unwrap();
        assert_eq!((&summary["steps"], &summary["finished"]), (&Value::from(3), &Value::from(false)));
        bench.ok("train", &["--set", &setting, "--out", &names[2], "--resume"]);
        for name in &names[1..] {
            bench.assert_same_checkpoint(&names[0], name, 6);
            assert_eq!(bench.events(&names[0]), bench.events(name), "{name}");
        }
        // The runs moved the adapter at all, and by their optimiser.
        let adapter = |name: &str, step| bench.checkpoint(name, step)["adapter_model.safetensors"].clone();
        assert!(adapter(&names[2], 3) != adapter(&names[2], 6));
        let codes =
            bench.checkpoint(&names[0], 6)["optimizer.safetensors"].windows(5).any(|at| at == b"codes");
        assert_eq!(codes, optimizer == "adamw_8bit");
        let page = std::fs::read_to_string(bench.path(&names[2]).join("report.html")).unwrap();
        assert!(page.contains("<h1>run</h1>") && page.matches("<polyline").count() == 3);
    }
}

#[test]
fn steps_stand_in_the_metrics_once_after_a_crash_between_checkpoints() {
    let bench = Bench::new();
    bench.ok("train", &["--out", "whole", "--set", "train.save_every=2"]);
    bench.ok("train", &["--out", "cut", "--set", "train.save_every=2"]);
    // As a power cut within the last save leaves it: metrics up to step 6, half a line, half a checkpoint.
    let cut = bench.path("cut");
    std::fs::rename(cut.join("step-000006"), cut.join(".granite-incomplete-x1")).unwrap();
    std::fs::remove_file(cut.join(".granite-incomplete-x1/state.json")).unwrap();
    let mut metrics = std::fs::read(cut.join("metrics.jsonl")).unwrap();
    metrics.extend(b"{\"event\":\"st");
    std::fs::write(cut.join("metrics.jsonl"), metrics).unwrap();

    let output = bench
        .command("train", &["--out", "cut", "--set", "train.save_every=2", "--resume"])
        .output()
        .unwrap();
    let told = crate::bench::told(&output);
    assert!(output.status.success(), "{told}");
    assert_told(&told, &["resuming after step 4 of 6"]);
    bench.assert_same_checkpoint("whole", "cut", 6);
    assert_eq!(bench.events("whole"), bench.events("cut"));
    let steps = bench.events("cut").into_iter().filter(|event| event["event"] == "step");
    assert_eq!(steps.map(|event| event["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_microbatch_of_four_rows_is_four_of_one() {
    let bench = Bench::new();
    let shared = ["--set", "lora.dropout=0.0", "--set", "train.max_steps=2", "--set", "train.warmup=0"];
    for (name, rows, accumulation) in [("wide", 4, 1), ("narrow", 1, 4)] {
        let (rows, accumulation) =
            (format!("train.rows_per_microbatch={rows}"), format!("train.accumulation={accumulation}"));
        let own = ["--out", name, "--set", &rows, "--set", &accumulation];
        bench.ok("train", &[&shared[..], &own].concat());
    }
    let numbers = |run: &str| -> Vec<(Value, [f64; 2])> {
        let steps = bench.events(run).into_iter().filter(|event| event["event"] == "step");
        let number = |event: &Value, key: &str| event[key].as_f64().unwrap();
        steps
            .map(|event| (event["rows"].clone(), [number(&event, "loss"), number(&event, "grad_norm")]))
            .collect()
    };
    let (wide, narrow) = (numbers("wide"), numbers("narrow"));
    assert_eq!(wide.len(), 2);
    assert_eq!(wide[0].0.as_array().unwrap().len(), 4);
    for ((rows, one), (others, other)) in wide.iter().zip(&narrow) {
        assert_eq!(rows, others);
        for (a, b) in one.iter().zip(other) {
            // Sums of some hundred f32 terms in another order.
            assert!((a / b - 1.0).abs() < 256.0 * f64::from(f32::EPSILON), "{a} and {b}");
        }
    }
    assert!(wide[0].1[0] - wide[1].1[0] != 0.0, "the second step sees another adapter and other rows");
}

#[test]
fn the_newest_checkpoints_stay() {
    let bench = Bench::new();
    bench.ok("train", &["--out", "run", "--set", "train.save_every=1", "--set", "train.keep_last=2"]);
    assert_eq!(bench.checkpoints("run"), ["step-000005", "step-000006"]);
}
