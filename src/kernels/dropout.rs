//! Dropout whose mask is a function of a counter, so that recompute and resume see the same mask.
//!
//! Element `i` of a tensor takes the low 15 bits of half `i % 2` of word `i / 2 % 4` of Philox4x32 (see [`super::philox`]) at
//! the counter `[i / 8, module, microbatch low, microbatch high]` under the key `[seed low, seed high]`. Nothing is hashed: two
//! different (seed, micro-batch, module, element) never share these bits, as long as a tensor has at most 2³⁵ elements. The
//! probability is thus a multiple of 2⁻¹⁵, and the scale belongs to that multiple, so the expectation is exact.

use anyhow::{Result, bail, ensure};
use cudarc::driver::LaunchConfig;
use half::bf16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::gpu::{Gpu, KernelParams};
use super::host::{self, Element};
use super::philox::{ROUNDS, philox4x32};
use super::rows::{Rows, gpu_of, vectorised};

/// Elements a mask can cover: 2³² counters of eight halves.
const MAX_ELEMENTS: usize = 1 << 35;

/// Bits that decide an element.
const BITS: u32 = 15;

/// What an element's bits are compared in units of.
const UNITS: u32 = 1 << BITS;

/// Names one mask: same key, same mask, on every device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Counter of the micro-batch since the start of the run.
    pub microbatch: u64,
    /// Which adapted module: `layer * 7 + index of the projection`.
    pub module: u32,
}

/// `x` with elements dropped with probability `p` and the others scaled by `1/(1-p)`, in the dtype of `x`
/// (f32 or bf16, any shape, contiguous). Applied to an output gradient with the same key it is also the backward pass.
///
/// `p` is rounded to a multiple of 2⁻¹⁵. A kept element is `round(x · s)` with `s = 1/(1-p)` rounded to f32, the product in f32 and rounded to nearest even;
/// a dropped one is `+0`, whatever `x` was; no number is the NaN with all bits but the sign set. With `p = 0` the result shares the memory of `x`.
/// The result is a plain value: libtorch's autograd does not see through it.
///
/// # Errors
/// When `x` is not contiguous, of a dtype the kernel lacks or larger than 2³⁵ elements, or `p` is outside `[0, 1)` or rounds to 1.
pub fn dropout(x: &Tensor, p: f64, key: DropoutKey) -> Result<Tensor> {
    if p == 0.0 || !x.device().is_cuda() {
        return dropout_reference(x, p, key);
    }
    check(x, p)?;
    let y = x.f_empty_like()?;
    launch(x, &y, Mask::new(p, key))?;
    Ok(y)
}

/// The twin of [`dropout`]: the same bits on any device, computed on the processor.
///
/// # Errors
/// As [`dropout`].
pub fn dropout_reference(x: &Tensor, p: f64, key: DropoutKey) -> Result<Tensor> {
    check(x, p)?;
    if p == 0.0 {
        return Ok(x.shallow_clone());
    }
    let on_cpu = x.f_to_device(Device::Cpu)?;
    let mask = Mask::new(p, key);
    let y = match x.kind() {
        Kind::Float => apply::<f32>(&on_cpu, mask)?,
        _ => apply::<bf16>(&on_cpu, mask)?,
    };
    Ok(y.f_to_device(x.device())?)
}

/// [`dropout`] of the rows of `x` into those of `y`: views `[rows, columns]` of one dtype (f32 or bf16) whose rows may lie
/// any distance apart, not overlapping. The mask is that of a contiguous `[rows, columns]`. With `p = 0` it is a copy.
///
/// # Errors
/// When shapes, dtypes or devices differ, rows overlap or are not contiguous, they hold more than 2³⁵ elements, `p` is
/// outside `[0, 1)`, or the driver fails.
pub fn dropout_rows_into(x: &Tensor, y: &Tensor, p: f64, key: DropoutKey) -> Result<()> {
    let (from, to) = check_rows(x, y, p)?;
    if y.device().is_cuda() {
        return launch_rows(
            ["dropout_rows_f32", "dropout_rows_bf16"],
            x.kind(),
            &from,
            &to,
            Mask::new(p, key),
        );
    }
    Ok(y.shallow_clone().f_copy_(&dropout_reference(&x.f_contiguous()?, p, key)?)?)
}

/// Adds [`dropout`] of the rows of `d` to those of `dx`, views as in [`dropout_rows_into`]. Product and sum are in f32,
/// rounded to `dx`'s dtype once: the backward pass of dropout into a gradient that exists.
///
/// # Errors
/// As [`dropout_rows_into`].
pub fn dropout_add_rows(dx: &Tensor, d: &Tensor, p: f64, key: DropoutKey) -> Result<()> {
    let (from, to) = check_rows(d, dx, p)?;
    if dx.device().is_cuda() {
        let names = ["dropout_add_rows_f32", "dropout_add_rows_bf16"];
        return launch_rows(names, d.kind(), &from, &to, Mask::new(p, key));
    }
    dropout_add_rows_reference(dx, d, p, key)
}

/// The twin of [`dropout_add_rows`], on any device.
///
/// # Errors
/// As [`dropout_add_rows`].
pub fn dropout_add_rows_reference(dx: &Tensor, d: &Tensor, p: f64, key: DropoutKey) -> Result<()> {
    check_rows(d, dx, p)?;
    // In f32 the kept products are not rounded again.
    let kept = dropout_reference(&d.f_to_kind(Kind::Float)?.f_contiguous()?, p, key)?;
    Ok(dx.shallow_clone().f_copy_(&(dx.f_to_kind(Kind::Float)? + kept))?)
}

fn check_rows<'a>(x: &'a Tensor, y: &'a Tensor, p: f64) -> Result<(Rows<'a>, Rows<'a>)> {
    check_mask(x, p)?;
    let from = Rows::new("x", x, x.kind())?;
    let to = Rows::of("y", y, x.kind(), [from.rows, from.columns])?;
    ensure!(x.device() == y.device(), "dropout from {:?} to {:?}", x.device(), y.device());
    Ok((from, to))
}

fn check(x: &Tensor, p: f64) -> Result<()> {
    ensure!(x.is_contiguous(), "dropout needs a contiguous tensor, got strides {:?}", x.stride());
    check_mask(x, p)
}

fn check_mask(x: &Tensor, p: f64) -> Result<()> {
    ensure!(has_mask(p), "dropout probability is {p}, expected a value in [0, 1) that does not round to 1");
    ensure!(x.numel() <= MAX_ELEMENTS, "dropout covers at most {MAX_ELEMENTS} elements, got {}", x.numel());
    match x.kind() {
        Kind::Float | Kind::BFloat16 => Ok(()),
        other => bail!("dropout is built for f32 and bf16, got {other:?}"),
    }
}

/// One mask, ready to apply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mask {
    key: DropoutKey,
    /// An element is dropped when its bits are below this: `p` in units of 2⁻¹⁵.
    pub(super) threshold: u32,
    /// `1/(1-p)` of that `p`.
    pub(super) scale: f32,
}

/// Whether there are masks of probability `p`: it is in `[0, 1)` and does not round to 1.
pub fn has_mask(p: f64) -> bool {
    (0.0..1.0).contains(&p) && threshold(p) < UNITS
}

fn threshold(p: f64) -> u32 {
    // p < 1, so the product is at most 2¹⁵.
    (p * f64::from(UNITS)).round() as u32
}

impl Mask {
    /// The mask of `key` with `p` in `[0, 1)`, not so near 1 that it rounds to it.
    pub(super) fn new(p: f64, key: DropoutKey) -> Self {
        let threshold = threshold(p);
        let share = f64::from(threshold) / f64::from(UNITS);
        Self { key, threshold, scale: (1.0 / (1.0 - share)) as f32 }
    }
}

/// The argument of the kernels in cuda/dropout.cu, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct DropoutParams {
    x: u64,
    y: u64,
    elements: u64,
    seed: u64,
    microbatch: u64,
    module: u32,
    threshold: u32,
    scale: f32,
    vectorised: u32,
}

const _: () = assert!(size_of::<DropoutParams>() == 56, "cuda/dropout.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/dropout.cu.
unsafe impl KernelParams for DropoutParams {}

/// Threads of a block of the kernels.
const THREADS: usize = 256;

/// Bytes that a thread of the kernels owns.
const THREAD_BYTES: usize = 16;

/// Writes the dropped and scaled elements of `x` to `y` on their GPU. `x` has passed [`check`].
pub(super) fn launch(x: &Tensor, y: &Tensor, mask: Mask) -> Result<()> {
    ensure!(
        y.device() == x.device() && y.kind() == x.kind() && y.size() == x.size() && y.is_contiguous(),
        "dropout writes {:?} {:?} on {:?}, its output is {:?} {:?} on {:?}",
        x.kind(),
        x.size(),
        x.device(),
        y.kind(),
        y.size(),
        y.device()
    );
    let elements = x.numel();
    if elements == 0 {
        return Ok(());
    }
    let gpu = Gpu::of(x)?;
    let kernel =
        gpu.kernel("dropout", if x.kind() == Kind::Float { "dropout_f32" } else { "dropout_bf16" })?;
    let (from, to) = (x.data_ptr() as u64, y.data_ptr() as u64);
    let params = DropoutParams {
        x: from,
        y: to,
        elements: elements as u64,
        seed: mask.key.seed,
        microbatch: mask.key.microbatch,
        module: mask.key.module,
        threshold: mask.threshold,
        scale: mask.scale,
        vectorised: u32::from((from | to).is_multiple_of(THREAD_BYTES as u64)),
    };
    let threads = elements.div_ceil(THREAD_BYTES / x.kind().elt_size_in_bytes());
    // At most 2³⁵ elements, so at most 2²⁵ blocks.
    let blocks = threads.div_ceil(THREADS) as u32;
    let shape =
        LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: x and y are contiguous, of the kernel's dtype and length, on this GPU (checked above), and y is written by
    // nobody else; libtorch orders the release of both after this launch.
    unsafe { gpu.launch(kernel, shape, &params) }
}

/// The argument of the kernels of rows in cuda/dropout.cu, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct DropoutRowsParams {
    x: u64,
    y: u64,
    elements: u64,
    columns: u64,
    x_stride: u64,
    y_stride: u64,
    seed: u64,
    microbatch: u64,
    module: u32,
    threshold: u32,
    scale: f32,
    vectorised: u32,
}

const _: () = assert!(size_of::<DropoutRowsParams>() == 80, "cuda/dropout.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/dropout.cu.
unsafe impl KernelParams for DropoutRowsParams {}

/// Runs one of the kernels of rows, of which `names` has the f32 and the bf16 form. The rows have passed [`check_rows`].
fn launch_rows(names: [&'static str; 2], kind: Kind, x: &Rows<'_>, y: &Rows<'_>, mask: Mask) -> Result<()> {
    let (elements, columns) = ((x.rows * x.columns) as u64, x.columns as u64);
    if elements == 0 {
        return Ok(());
    }
    let size = THREAD_BYTES as u64 / kind.elt_size_in_bytes() as u64;
    let gpu = gpu_of(&[x, y])?;
    let kernel = gpu.kernel("dropout", names[usize::from(kind != Kind::Float)])?;
    let params = DropoutRowsParams {
        x: x.address(),
        y: y.address(),
        elements,
        columns,
        x_stride: x.stride(),
        y_stride: y.stride(),
        seed: mask.key.seed,
        microbatch: mask.key.microbatch,
        module: mask.key.module,
        threshold: mask.threshold,
        scale: mask.scale,
        vectorised: u32::from(vectorised(&[x, y]) && columns / size <= u64::from(u32::MAX)),
    };
    // At most 2³⁵ elements, so at most 2²⁵ blocks.
    let blocks = elements.div_ceil(size).div_ceil(THREADS as u64) as u32;
    let shape =
        LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: x and y are rows of the kernel's dtype and of one shape on this GPU (checked above), y is written by nobody
    // else; libtorch orders the release of both after this launch.
    unsafe { gpu.launch(kernel, shape, &params) }
}

/// An element type of the twin.
trait Scale: Element {
    /// What a dropped element becomes.
    const DROPPED: Self;

    /// The element times `scale`, multiplied in f32 and rounded to nearest even.
    fn scaled(self, scale: f32) -> Self;
}

impl Scale for f32 {
    const DROPPED: Self = 0.0;

    #[inline(always)]
    fn scaled(self, scale: f32) -> Self {
        let product = self * scale;
        // A GPU's product that is no number is always this NaN.
        if product.is_nan() { Self::from_bits(0x7fff_ffff) } else { product }
    }
}

impl Scale for bf16 {
    const DROPPED: Self = Self::ZERO;

    /// On the bits, which unlike the library's conversions turns into vector instructions.
    #[inline(always)]
    fn scaled(self, scale: f32) -> Self {
        let product = f32::from_bits(u32::from(self.to_bits()) << 16) * scale;
        let bits = product.to_bits();
        let half_way = 0x7fff + ((bits >> 16) & 1);
        let rounded = (bits.wrapping_add(half_way) >> 16) as u16;
        // The NaN that a GPU's conversion writes.
        Self::from_bits(if product.is_nan() { 0x7fff } else { rounded })
    }
}

/// Counters computed together: eight u32 fill an AVX2 register.
const LANES: usize = 8;

/// Elements of a group of [`LANES`] counters.
const GROUP: usize = 8 * LANES;

/// Elements of a task: large enough that handing it to a thread is free, small enough that threads finish together.
const TASK: usize = 512 * GROUP;

/// The dropped and scaled elements of a contiguous CPU tensor.
fn apply<T: Scale>(x: &Tensor, mask: Mask) -> Result<Tensor> {
    let elements = host::slice::<T>(x)?;
    Ok(host::filled(&x.size(), |y: &mut [T]| {
        elements.par_chunks(TASK).zip(y.par_chunks_mut(TASK)).enumerate().for_each(|(task, (x, y))| {
            // At most 2³⁵ elements, so a counter fits 32 bits.
            task_on_best(x, y, (task * (TASK / 8)) as u32, mask);
        });
    }))
}

/// Runs [`apply_task`] with the widest vectors this processor has.
fn task_on_best<T: Scale>(x: &[T], y: &mut [T], first_counter: u32, mask: Mask) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as just asked.
        return unsafe { apply_task_avx2(x, y, first_counter, mask) };
    }
    apply_task(x, y, first_counter, mask);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn apply_task_avx2<T: Scale>(x: &[T], y: &mut [T], first_counter: u32, mask: Mask) {
    apply_task(x, y, first_counter, mask);
}

#[inline(always)]
fn apply_task<T: Scale>(x: &[T], y: &mut [T], first_counter: u32, mask: Mask) {
    for (group, (x, y)) in x.chunks(GROUP).zip(y.chunks_mut(GROUP)).enumerate() {
        let bits = group_bits(first_counter.wrapping_add((group * LANES) as u32), mask.key);
        for ((y, &x), &bits) in y.iter_mut().zip(x).zip(&bits) {
            *y = if bits < mask.threshold { T::DROPPED } else { x.scaled(mask.scale) };
        }
    }
}

/// The bits of [`LANES`] successive counters' elements, in their order.
#[inline(always)]
fn group_bits(first_counter: u32, key: DropoutKey) -> [u32; GROUP] {
    let counter = [
        std::array::from_fn(|lane| first_counter.wrapping_add(lane as u32)),
        [key.module; LANES],
        [key.microbatch as u32; LANES],
        [(key.microbatch >> 32) as u32; LANES],
    ];
    let by_word = philox4x32::<ROUNDS, LANES>(counter, [key.seed as u32, (key.seed >> 32) as u32]);
    std::array::from_fn(|element| by_word[element / 2 % 4][element / 8] >> (16 * (element % 2)) & (UNITS - 1))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    const KEY: DropoutKey = DropoutKey { seed: 0x0123_4567_89ab_cdef, microbatch: 5, module: 3 };

    /// Which elements the mask of `key` keeps.
    fn kept(elements: i64, p: f64, key: DropoutKey) -> Vec<bool> {
        let ones = Tensor::ones([elements], (Kind::Float, Device::Cpu));
        let y: Vec<f32> = Vec::try_from(&dropout_reference(&ones, p, key).unwrap()).unwrap();
        y.into_iter().map(|value| value != 0.0).collect()
    }

    /// How far `hits` of `trials` lies from probability `p`, in standard deviations of the binomial.
    fn sigmas(hits: usize, trials: usize, p: f64) -> f64 {
        let (hits, trials) = (hits as f64, trials as f64);
        (hits - trials * p).abs() / (trials * p * (1.0 - p)).sqrt()
    }

    fn agreeing(a: &[bool], b: &[bool]) -> usize {
        a.iter().zip(b).filter(|(a, b)| a == b).count()
    }

    #[test]
    fn each_element_takes_its_own_bits() {
        // Against the definition in the module's head, one counter at a time.
        let [low, high] = [KEY.seed as u32, (KEY.seed >> 32) as u32];
        let mask = kept(1001, 0.3, KEY);
        for (element, kept) in mask.into_iter().enumerate() {
            let counter = [[element as u32 / 8], [KEY.module], [KEY.microbatch as u32], [0]];
            let word = philox4x32::<ROUNDS, 1>(counter, [low, high])[element % 8 / 2][0];
            let half = if element % 2 == 0 { word & 0xffff } else { word >> 16 };
            assert_eq!(kept, half % 32_768 >= (0.3_f64 * 32_768.0).round() as u32, "element {element}");
        }
    }

    #[test]
    fn keeps_the_share_it_should() {
        let trials = 1 << 20;
        for p in [0.01, 0.1, 0.5, 0.9, 1.0 - 1e-4] {
            let hits = kept(trials, p, KEY).into_iter().filter(|&kept| kept).count();
            assert!(sigmas(hits, trials as usize, 1.0 - p) < 5.0, "p = {p}: kept {hits} of {trials}");
        }
    }

    #[test]
    fn keys_and_neighbours_are_independent() {
        let trials = 1 << 20;
        let p = 0.5;
        let mask = kept(trials, p, KEY);
        let others = [
            DropoutKey { seed: KEY.seed + 1, ..KEY },
            DropoutKey { seed: KEY.seed ^ (1 << 32), ..KEY },
            DropoutKey { microbatch: KEY.microbatch + 1, ..KEY },
            DropoutKey { microbatch: KEY.microbatch ^ (1 << 32), ..KEY },
            DropoutKey { module: KEY.module + 1, ..KEY },
            DropoutKey { microbatch: u64::from(KEY.module), module: KEY.microbatch as u32, ..KEY },
        ];
        for other in others {
            let same = agreeing(&mask, &kept(trials, p, other));
            assert!(sigmas(same, trials as usize, 0.5) < 5.0, "{other:?}: {same} of {trials} agree");
        }
        for distance in [1, 2, 3, 4, 8, 16, 64, 576] {
            let same = agreeing(&mask[distance..], &mask[..mask.len() - distance]);
            assert!(sigmas(same, trials as usize - distance, 0.5) < 5.0, "neighbours at {distance}: {same}");
        }
    }

    #[test]
    fn a_longer_tensor_begins_with_the_same_mask() {
        let long = kept(70_001, 0.1, KEY);
        for elements in [0, 1, 3, 4, 5, 31, 32, 33, 16_384, 16_385, 50_001] {
            assert_eq!(kept(elements, 0.1, KEY), long[..elements as usize], "{elements} elements");
        }
    }

    #[test]
    fn scales_in_f32_and_rounds_to_nearest_even() {
        let x = Tensor::randn([37, 61], (Kind::Float, Device::Cpu));
        let p = 0.125;
        let mask = kept(37 * 61, p, KEY);
        for kind in [Kind::Float, Kind::BFloat16] {
            let x = x.to_kind(kind);
            let y = dropout(&x, p, KEY).unwrap();
            assert_eq!((y.kind(), y.size()), (kind, x.size()));
            let mask = Tensor::from_slice(&mask).view([37, 61]).to_kind(Kind::Float);
            let wanted =
                (x.to_kind(Kind::Float) * Tensor::from((1.0 / (1.0 - p)) as f32) * mask).to_kind(kind);
            assert!(y.equal(&wanted), "{kind:?}");
        }
    }

    #[test]
    fn backward_is_the_same_mask() {
        let x = Tensor::randn([129, 7], (Kind::Float, Device::Cpu)).abs() + 0.1;
        let dy = Tensor::randn([129, 7], (Kind::Float, Device::Cpu)).abs() + 0.1;
        let y = dropout(&x, 0.4, KEY).unwrap();
        let dx = dropout(&dy, 0.4, KEY).unwrap();
        assert!(y.not_equal(0.0).equal(&dx.not_equal(0.0)));
    }

    #[test]
    fn a_dropped_element_is_zero_whatever_it_was() {
        let x = Tensor::full([4096], f64::INFINITY, (Kind::Float, Device::Cpu));
        let y: Vec<f32> = Vec::try_from(&dropout(&x, 0.5, KEY).unwrap()).unwrap();
        assert!(y.iter().all(|&value| value == 0.0 || value == f32::INFINITY));
        assert!(y.contains(&0.0) && y.contains(&f32::INFINITY));
    }

    #[test]
    fn nothing_to_drop_and_nothing_at_all() {
        let x = Tensor::randn([5, 3], (Kind::Float, Device::Cpu));
        assert!(dropout(&x, 0.0, KEY).unwrap().equal(&x));
        let empty = Tensor::zeros([0, 3], (Kind::BFloat16, Device::Cpu));
        assert_eq!(dropout(&empty, 0.1, KEY).unwrap().size(), [0, 3]);
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        let x = Tensor::randn([4, 6], (Kind::Float, Device::Cpu));
        for p in [-0.1, 1.0, f64::NAN] {
            assert!(dropout(&x, p, KEY).unwrap_err().to_string().contains("[0, 1)"));
        }
        assert!(dropout(&x, 1.0 - 1e-6, KEY).unwrap_err().to_string().contains("round to 1"));
        assert!(dropout(&x.tr(), 0.1, KEY).unwrap_err().to_string().contains("contiguous"));
        let double = x.to_kind(Kind::Double);
        assert!(dropout(&double, 0.1, KEY).unwrap_err().to_string().contains("f32 and bf16"));
    }

    /// A view `[rows, columns]` inside a wider buffer of sevens.
    fn strided(values: &Tensor) -> (Tensor, Tensor) {
        let (rows, columns) = values.size2().unwrap();
        let buffer = Tensor::full([rows, columns + 5], 7.0, (values.kind(), Device::Cpu));
        let view = buffer.narrow(1, 3, columns);
        view.shallow_clone().copy_(values);
        (buffer, view)
    }

    #[test]
    fn rows_take_the_mask_of_the_contiguous_matrix() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (rows, columns) in [(1, 1), (3, 7), (5, 64)] {
                let x = Tensor::randn([rows, columns], (kind, Device::Cpu));
                let (buffer, y) = strided(&x.zeros_like());
                dropout_rows_into(&strided(&x).1, &y, 0.3, KEY).unwrap();
                assert!(y.equal(&dropout(&x, 0.3, KEY).unwrap()), "{kind:?} [{rows}, {columns}]");
                assert_eq!(buffer.eq(7.0).sum(Kind::Int64).int64_value(&[]), rows * 5);
                dropout_rows_into(&x, &y, 0.0, KEY).unwrap();
                assert!(y.equal(&x));
            }
        }
    }

    #[test]
    fn an_added_row_is_rounded_once() {
        let dx = Tensor::randn([9, 33], (Kind::BFloat16, Device::Cpu));
        let d = Tensor::randn([9, 33], (Kind::BFloat16, Device::Cpu)) * 0.01;
        let (buffer, sum) = strided(&dx);
        dropout_add_rows(&sum, &strided(&d).1, 0.4, KEY).unwrap();
        let kept = dropout(&d.to_kind(Kind::Float), 0.4, KEY).unwrap();
        assert!(sum.equal(&(dx.to_kind(Kind::Float) + kept).to_kind(Kind::BFloat16)));
        assert_eq!(buffer.eq(7.0).sum(Kind::Int64).int64_value(&[]), 45);
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() {
        let x = Tensor::zeros([4, 6], (Kind::Float, Device::Cpu));
        let refused = |y: &Tensor| dropout_rows_into(&x, y, 0.1, KEY).unwrap_err().to_string();
        assert!(refused(&x.narrow(0, 0, 3)).contains("[3, 6], expected [4, 6]"));
        assert!(refused(&x.to_kind(Kind::BFloat16)).contains("BFloat16"));
        assert!(refused(&Tensor::zeros([6, 4], (Kind::Float, Device::Cpu)).tr()).contains("not contiguous"));
        assert!(dropout_add_rows(&x, &x, 1.0, KEY).unwrap_err().to_string().contains("[0, 1)"));
    }
}
