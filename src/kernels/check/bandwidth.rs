//! How fast memory moves while a kernel runs.

use std::time::Instant;

use anyhow::{Result, ensure};
use tch::{Cuda, Device, Kind, Tensor};

use super::{BEYOND_CACHES, Outcome};

/// Launches timed together: enough that starting and waiting for them (about 10 µs) does not count.
const LAUNCHES: usize = 20;

/// Best of so many.
const ROUNDS: usize = 5;

/// GB/s of a kernel that moves `bytes` a launch. `launch` is told which of `sets` of operands to use, in turn, so that
/// together they exceed every cache.
pub(super) fn bandwidth(
    device: Device,
    bytes: i64,
    sets: usize,
    launch: impl FnMut(usize) -> Result<()>,
) -> Result<f64> {
    Ok(bytes as f64 / seconds(device, sets, launch)? / 1e9)
}

/// Seconds of a launch: the best of some rounds; `sets` as in [`bandwidth`].
pub(super) fn seconds(
    device: Device,
    sets: usize,
    mut launch: impl FnMut(usize) -> Result<()>,
) -> Result<f64> {
    let mut best = f64::INFINITY;
    // One round more, to load the kernel and wake the clocks.
    for _ in 0..=ROUNDS {
        synchronize(device);
        let start = Instant::now();
        (0..LAUNCHES).try_for_each(|turn| launch(turn % sets))?;
        synchronize(device);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best / LAUNCHES as f64)
}

/// The device's own copy: what a kernel bound by memory is measured against.
pub(super) fn copy(device: Device) -> Result<Outcome> {
    let x = Tensor::f_ones([1000], (Kind::BFloat16, device))?;
    let mut y = x.f_zeros_like()?;
    y.f_copy_(&x)?;
    ensure!(y.equal(&x), "a copy differs from what was copied");
    Ok(Outcome::exact(1).timed(move || copy_rate(device)))
}

fn copy_rate(device: Device) -> Result<f64> {
    let x = Tensor::f_ones([BEYOND_CACHES / 2], (Kind::BFloat16, device))?;
    let mut y = x.f_zeros_like()?;
    bandwidth(device, 2 * BEYOND_CACHES, 1, |_| {
        y.f_copy_(&x)?;
        Ok(())
    })
}

fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}
