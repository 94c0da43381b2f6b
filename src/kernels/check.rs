//! Each kernel against its twin, on the GPU at hand: `granite doctor --kernels` and the tests run this.
//!
//! Sizes include one, odd ones and ones that no block divides; operands begin at aligned and at unaligned addresses; inputs
//! are made anew from the seed; outputs are poisoned first and lie between guards that must stay as they were.
//! A kernel that can be exact must equal its twin bit for bit (`exact`), others keep to a tolerance (`tolerance`).

mod adamw;
mod adapter_dropout;
mod attention;
mod bandwidth;
mod bitsandbytes;
mod cross_entropy;
mod dropout;
mod exact;
mod inputs;
mod nf4;
pub mod rates;
mod rms_norm;
mod rope;
mod swiglu;
mod tolerance;

use anyhow::Result;
use tch::{Device, Kind};

pub use self::bitsandbytes::codes_beyond_boundary;
use super::bitsandbytes::CudaLibrary;

/// What became of one check.
#[derive(Debug)]
pub struct Check {
    /// The kernel, or what was compared.
    pub name: &'static str,
    /// Comparisons made.
    pub cases: usize,
    /// Whether equality bit for bit was asked for, not nearness.
    pub exact: bool,
    /// What differed, when something did.
    pub failure: Option<String>,
    /// GB/s of memory traffic at a size beyond every cache, where that bounds the kernel.
    pub bandwidth: Option<f64>,
}

impl Check {
    /// What came of a check; where its kernel is bound by memory and time is to be taken, it is timed now.
    fn new(name: &'static str, outcome: Result<Outcome>, timed: bool) -> Self {
        let timing = |outcome: Outcome| -> Result<(usize, bool, Option<f64>)> {
            let bandwidth = outcome.timing.filter(|_| timed).map(|timing| timing()).transpose()?;
            Ok((outcome.cases, outcome.exact, bandwidth))
        };
        match outcome.and_then(timing) {
            Ok((cases, exact, bandwidth)) => Self { name, cases, exact, failure: None, bandwidth },
            Err(error) => {
                Self { name, cases: 0, exact: false, failure: Some(format!("{error:#}")), bandwidth: None }
            }
        }
    }
}

/// What a check that found nothing wrong has to say.
struct Outcome {
    cases: usize,
    exact: bool,
    timing: Option<Timing>,
}

/// Measures GB/s.
type Timing = Box<dyn FnOnce() -> Result<f64>>;

impl Outcome {
    /// So many comparisons bit for bit.
    fn exact(cases: usize) -> Self {
        Self { cases, exact: true, timing: None }
    }

    /// So many comparisons within a tolerance.
    fn near(cases: usize) -> Self {
        Self { cases, exact: false, timing: None }
    }

    /// With the way to measure the kernel's bandwidth, in GB/s.
    fn timed(self, timing: impl FnOnce() -> Result<f64> + 'static) -> Self {
        Self { timing: Some(Box::new(timing)), ..self }
    }
}

/// Bytes that no cache of a GPU holds.
const BEYOND_CACHES: i64 = 256 << 20;

/// Which checks to make, and how much of them.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Beginnings of names; all checks when empty.
    pub only: Vec<String>,
    /// Fewer and smaller cases where there are many, and no timing: for a memory checker, under which a kernel takes a
    /// hundred times as long.
    pub short: bool,
}

impl Selection {
    /// Whether a check is asked for.
    pub fn takes(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|start| name.starts_with(start.as_str()))
    }

    /// What is asked for and begins no name.
    pub fn unknown<'a>(&'a self, names: &[&str]) -> Option<&'a str> {
        self.only.iter().map(String::as_str).find(|start| !names.iter().any(|name| name.starts_with(start)))
    }
}

/// Checks on their way: each is told by its name and run where the selection takes it.
struct Checks<'a> {
    selection: &'a Selection,
    /// `None` to list the names alone.
    device: Option<Device>,
    names: Vec<&'static str>,
    made: Vec<Check>,
}

impl<'a> Checks<'a> {
    fn new(selection: &'a Selection, device: Option<Device>) -> Self {
        Self { selection, device, names: Vec::new(), made: Vec::new() }
    }

    fn run(&mut self, name: &'static str, check: impl FnOnce(Device) -> Result<Outcome>) {
        self.names.push(name);
        if let Some(device) = self.device.filter(|_| self.selection.takes(name)) {
            self.made.push(Check::new(name, check(device), !self.selection.short));
        }
    }

    /// Checks that share their cases: all are made when one is taken, and those taken are told.
    fn together(&mut self, names: &[&'static str], checks: impl FnOnce(Device, bool) -> Vec<Check>) {
        self.names.extend(names);
        let selection = self.selection;
        if let Some(device) = self.device.filter(|_| names.iter().any(|name| selection.takes(name))) {
            let made = checks(device, selection.short);
            self.made.extend(made.into_iter().filter(|check| selection.takes(check.name)));
        }
    }
}

/// The names of all checks, in their order.
pub fn names() -> Vec<&'static str> {
    let selection = Selection::default();
    let mut checks = Checks::new(&selection, None);
    each(&mut checks, None);
    checks.names
}

/// Checks what is selected on a GPU; the same seed and selection make the same inputs. Without bitsandbytes' library
/// nothing is compared with it.
pub fn run(device: Device, seed: i64, library: Option<&CudaLibrary>, selection: &Selection) -> Vec<Check> {
    tch::manual_seed(seed);
    let mut checks = Checks::new(selection, Some(device));
    each(&mut checks, library);
    checks.made
}

fn each(checks: &mut Checks<'_>, library: Option<&CudaLibrary>) {
    checks.run("device copy, for comparison", bandwidth::copy);
    checks.run("dropout_f32", |device| dropout::kernel(device, Kind::Float));
    checks.run("dropout_bf16", |device| dropout::kernel(device, Kind::BFloat16));
    checks.run("dropout_rows_f32", |device| dropout::rows(device, Kind::Float, false));
    checks.run("dropout_rows_bf16", |device| dropout::rows(device, Kind::BFloat16, false));
    checks.run("dropout_add_rows_f32", |device| dropout::rows(device, Kind::Float, true));
    checks.run("dropout_add_rows_bf16", |device| dropout::rows(device, Kind::BFloat16, true));
    adapter_dropout::checks(checks);
    checks.run("nf4 on the GPU, as on the processor", bitsandbytes::across_devices);
    rms_norm::checks(checks);
    rope::checks(checks);
    swiglu::checks(checks);
    attention::checks(checks);
    cross_entropy::checks(checks);
    nf4::checks(checks);
    adamw::checks(checks);
    match library {
        Some(library) => {
            checks.run("nf4, as bitsandbytes on the GPU", |device| {
                bitsandbytes::as_bitsandbytes(device, library)
            });
        }
        None => checks.names.push("nf4, as bitsandbytes on the GPU"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_takes_beginnings_of_names() {
        let names = names();
        let selection = |only: &[&str]| Selection {
            only: only.iter().map(ToString::to_string).collect(),
            ..Selection::default()
        };
        let taken = |only: &[&str]| names.iter().filter(|name| selection(only).takes(name)).count();
        assert_eq!(taken(&[]), names.len());
        assert_eq!(taken(&["attention_hopper_backward"]), 1);
        assert_eq!(taken(&["rope", "swiglu"]), 3);
        assert_eq!(selection(&["rope", "ropes"]).unknown(&names), Some("ropes"));
        assert_eq!(selection(&["attention"]).unknown(&names), None);
    }
}
