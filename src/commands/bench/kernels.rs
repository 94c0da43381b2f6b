//! `granite bench kernels`: each kernel's memory traffic beside the ceilings of the same run.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use super::{gpu, roofline};
use crate::cli::BenchKernelsArgs;
use crate::kernels::check::rates::{self, Ceilings, Rate};
use crate::kernels::driver;
use crate::{output, progress, stdout};

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    /// Name and version of the program.
    pub program: &'static str,
    /// As the driver calls it.
    pub gpu: String,
    #[serde(flatten)]
    pub ceilings: Ceilings,
    pub kernels: Vec<Figure>,
}

/// A kernel's rate and what follows from it.
#[derive(Debug, Serialize)]
pub(super) struct Figure {
    #[serde(flatten)]
    pub rate: Rate,
    /// Of the device copy's GB/s; a little above 1 where a kernel mostly reads.
    pub share_of_copy: f64,
    pub tflop_per_s: f64,
}

impl Figure {
    pub(super) fn new(rate: Rate, ceilings: &Ceilings) -> Self {
        let share_of_copy = rate.gb_per_s / ceilings.copy_gb_per_s;
        Self { share_of_copy, tflop_per_s: rate.gb_per_s * rate.flop_per_byte / 1e3, rate }
    }
}

/// Runs the subcommand: a table or JSON on stdout, and the page where one is asked for.
///
/// # Errors
/// When there is no GPU that can be used, a kernel fails, or the page cannot be written.
pub fn run(args: &BenchKernelsArgs) -> Result<()> {
    let figures = measure()?;
    if let Some(file) = &args.html {
        output::write_file(file, roofline::page(&figures).as_bytes())?;
        progress::note(format!("wrote `{}`", file.display()));
    }
    if args.json { stdout::json(&figures) } else { stdout::text(&table(&figures)) }
}

fn measure() -> Result<Figures> {
    let device = gpu()?;
    // The device that libtorch opens is the driver's first.
    let gpu = driver::probe()?.gpus.first().map_or_else(String::new, |gpu| gpu.name.clone());
    let bar = progress::bar(rates::ALL.len() as u64 + 1, "bench", "kernels");
    let ceilings = Ceilings::measure(device)?;
    bar.inc(1);
    let mut kernels = Vec::with_capacity(rates::ALL.len());
    for kernel in rates::ALL {
        kernels.push(Figure::new(kernel.run(device)?, &ceilings));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Figures { program: concat!("granite ", env!("CARGO_PKG_VERSION")), gpu, ceilings, kernels })
}

fn table(figures: &Figures) -> String {
    let Ceilings { copy_gb_per_s, gemm_tflop_per_s } = figures.ceilings;
    let mut text = format!(
        "{}: device copy {copy_gb_per_s:.0} GB/s, bf16 product {gemm_tflop_per_s:.0} TFLOP/s\n\n\
         {:<33} {:<26} {:>7} {:>8}\n",
        figures.gpu, "kernel", "shape", "GB/s", "of copy"
    );
    for Figure { rate: Rate { kernel, shape, gb_per_s, .. }, share_of_copy, .. } in &figures.kernels {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{kernel:<33} {shape:<26} {gb_per_s:>7.0} {:>6.1} %", 100.0 * share_of_copy);
    }
    text
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
pub(super) mod tests {
    use super::*;

    /// Numbers made up: of a GPU that does not exist.
    pub(in crate::commands::bench) fn made_up() -> Figures {
        let ceilings = Ceilings { copy_gb_per_s: 3000.0, gemm_tflop_per_s: 700.0 };
        let kernel = |kernel, shape, gb_per_s, flop_per_byte| {
            Figure::new(Rate { kernel, shape, gb_per_s, flop_per_byte }, &ceilings)
        };
        let kernels = vec![
            kernel("rms_norm", "8192 × 4096 bf16", 2700.0, 1.0),
            kernel("dropout_bf16", "134217728 bf16", 2850.0, 0.25),
            kernel("swiglu", "8192 × 12800 bf16", 1500.0, 5.0 / 6.0),
            kernel("cross_entropy", "2048 × 49155 bf16", 3100.0, 2.5),
            kernel("a<b", "1", 2700.0, 1.0),
        ];
        Figures { program: "granite", gpu: "Imaginary & Sons 1".to_string(), ceilings, kernels }
    }

    #[test]
    fn the_table_has_a_line_a_kernel_with_its_share() {
        let text = table(&made_up());
        let head = "Imaginary & Sons 1: device copy 3000 GB/s, bf16 product 700 TFLOP/s\n";
        assert!(text.starts_with(head), "{text}");
        let line = text.lines().find(|line| line.starts_with("swiglu ")).unwrap();
        assert!(line.contains("8192 × 12800 bf16") && line.ends_with("1500   50.0 %"), "{line}");
        assert_eq!(text.lines().count(), 3 + 5);
    }

    #[test]
    fn json_lays_everything_open() {
        let json = serde_json::to_value(made_up()).unwrap();
        let number = |value: &serde_json::Value| value.as_f64().unwrap();
        assert_eq!((number(&json["copy_gb_per_s"]), number(&json["gemm_tflop_per_s"])), (3000.0, 700.0));
        let first = &json["kernels"][0];
        assert_eq!(
            (first["kernel"].as_str(), first["shape"].as_str()),
            (Some("rms_norm"), Some("8192 × 4096 bf16"))
        );
        assert_eq!((number(&first["share_of_copy"]), number(&first["tflop_per_s"])), (0.9, 2.7));
    }
}
