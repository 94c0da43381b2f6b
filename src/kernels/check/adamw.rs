//! The kernels of cuda/adamw.cu: within a tolerance of the definition in f64, codes that are the nearest.

use anyhow::{Context as _, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::exact::first_difference;
use super::tolerance::{Framed, Layout, Reference};
use super::{BEYOND_CACHES, Checks, Outcome};
use crate::kernels::adamw::{
    AdamWStep, BLOCK, GRAD_PARTIALS, adamw_8bit, adamw_8bit_reference, adamw_32bit, adamw_32bit_reference,
    blocks_of, norm_squared, zero_codes,
};
use crate::kernels::bridge;
use crate::kernels::dynamic_map::dynamic_map;

/// The checks of this module.
pub(super) fn checks(checks: &mut Checks<'_>) {
    checks.run("grad_norm", grad_norm);
    checks.run("adamw_32bit", |device| adamw(device, Form::Wide));
    checks.run("adamw_8bit", |device| adamw(device, Form::Coded));
}

/// How moments are held.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Form {
    Wide,
    Coded,
}

/// Less than a vector, around a block of moments, several blocks with a rest, more than one wave of them.
const LENGTHS: [i64; 11] = [1, 3, 4, 255, 256, 257, 1000, 4096, 4697, 100_003, 2_097_152];

/// What an f32 result may be off by, beside its twin's error: relative to the terms that make it up.
const NOISE: f64 = 1.0 / (1 << 20) as f64;

fn grad_norm(device: Device) -> Result<Outcome> {
    let mut cases = 0;
    for len in LENGTHS {
        for offset in [0, 1] {
            // Squares that f32 could not hold.
            let g = Tensor::randn([len], (Kind::Float, device)) * 1e25;
            let g = Framed::input(&g, Layout::dense(1, len).at(offset))?;
            let partials = Framed::output(Kind::Double, Layout::dense(1, GRAD_PARTIALS), device)?;
            let out = Framed::output(Kind::Double, Layout::dense(1, 1), device)?;
            norm_squared(&g.flat(), &partials.flat(), &out.flat())?;
            partials.intact("the scratch")?;
            out.intact("the norm")?;
            let found = out.flat().double_value(&[0]);
            let wanted = g.flat().to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
            ensure!(
                (found - wanted).abs() <= 1e-12 * wanted,
                "{len} elements at {offset}: {found:e}, in f64 {wanted:e}"
            );
            norm_squared(&g.flat(), &partials.flat(), &out.flat())?;
            ensure!(
                out.flat().double_value(&[0]) == found,
                "{len} elements at {offset}: the sum does not repeat"
            );
            cases += 1;
        }
    }
    Ok(Outcome::near(cases).timed(move || norm_rate(device)))
}

/// Over 128 Mi numbers.
pub(super) fn norm_rate(device: Device) -> Result<f64> {
    let g = Tensor::f_ones([BEYOND_CACHES / 2], (Kind::Float, device))?;
    let scratch = Tensor::f_zeros([GRAD_PARTIALS], (Kind::Double, device))?;
    let out = Tensor::f_zeros([1], (Kind::Double, device))?;
    bandwidth(device, BEYOND_CACHES * 2, 1, |_| norm_squared(&g, &scratch, &out))
}

fn adamw(device: Device, form: Form) -> Result<Outcome> {
    Ok(Outcome::near(cases(device, form, &LENGTHS)?).timed(move || rate(device, form)))
}

fn cases(device: Device, form: Form, lengths: &[i64]) -> Result<usize> {
    let mut cases = 0;
    for &len in lengths {
        for offset in [0, 1] {
            for (copied, max_norm) in [(true, 0.0), (false, 0.7), (true, 1e30)] {
                let operands = Operands::random(form, len);
                let described =
                    || format!("{len} elements at {offset}, copy {copied}, clipped to {max_norm}");
                case(device, &operands, offset, copied, &step(max_norm)).with_context(described)?;
                cases += 1;
            }
        }
    }
    spoilt_gradients(device, form)?;
    in_host_memory(device, form).context("in the host's memory")?;
    Ok(cases + 2)
}

fn step(max_norm: f64) -> AdamWStep {
    AdamWStep {
        lr: 2e-3,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.05,
        correction1: 1.0 - 0.9f64.powi(3),
        correction2: (1.0 - 0.99f64.powi(3)).sqrt(),
        max_norm,
    }
}

/// What an update reads and writes, on the CPU or on the GPU.
struct Operands {
    form: Form,
    p: Tensor,
    g: Tensor,
    /// Codes or numbers.
    moments: [Tensor; 2],
    /// Scales of the codes, else empty.
    absmax: [Tensor; 2],
    norm_squared: Tensor,
}

impl Operands {
    /// On the CPU. Of many magnitudes; the second block is of zeros, the third so small that the kernel divides by its
    /// scale in two steps.
    fn random(form: Form, len: i64) -> Self {
        let floats = |len: i64| Tensor::randn([len], (Kind::Float, Device::Cpu));
        let g = floats(len) * floats(len).exp();
        let blocks = blocks_of(len);
        let scale = || (floats(blocks) * 3.0).exp();
        let (moments, absmax) = match form {
            Form::Wide => {
                ([floats(len), floats(len).square()], [scale().narrow(0, 0, 0), scale().narrow(0, 0, 0)])
            }
            Form::Coded => {
                let codes = || Tensor::randint(256, [len], (Kind::Uint8, Device::Cpu));
                ([codes(), codes()], [scale(), scale()])
            }
        };
        for (block, factor) in [(1, 0.0), (2, 1e-15)] {
            if len >= (block + 1) * BLOCK {
                let _ = g.narrow(0, block * BLOCK, BLOCK).g_mul_scalar_(factor);
                for (moment, factor) in absmax.iter().zip([factor, factor * factor]) {
                    if form == Form::Coded {
                        let _ = moment.narrow(0, block, 1).g_mul_scalar_(factor);
                    }
                }
            }
        }
        let norm_squared = g.to_kind(Kind::Double).square().sum(Kind::Double).view([1]);
        Self { form, p: floats(len), g, moments, absmax, norm_squared }
    }

    fn on(&self, device: Device, offset: i64) -> Result<[Framed; 6]> {
        let framed = |tensor: &Tensor, offset: i64| {
            let len = tensor.numel() as i64;
            Framed::input(&tensor.f_to_device(device)?, Layout::dense(1, len).at(offset))
        };
        Ok([
            framed(&self.p, offset)?,
            framed(&self.g, offset)?,
            framed(&self.moments[0], offset)?,
            framed(&self.moments[1], offset)?,
            framed(&self.absmax[0], 0)?,
            framed(&self.absmax[1], 0)?,
        ])
    }

    /// The moments before the update in f64, decoded in f32 as the definition says.
    fn decoded(&self) -> [Tensor; 2] {
        [0, 1].map(|index| {
            let moment = &self.moments[index];
            if self.form == Form::Wide {
                return moment.to_kind(Kind::Double);
            }
            let levels =
                Tensor::from_slice(&dynamic_map(index == 0)).index_select(0, &moment.to_kind(Kind::Int64));
            (levels * spread(&self.absmax[index], moment.size()[0])).to_kind(Kind::Double)
        })
    }

    /// Twin or kernel, by the device of the operands.
    fn update(&self, operands: &[Framed; 6], copy: Option<&Tensor>, step: &AdamWStep) -> Result<()> {
        let [p, g, m, v, m_absmax, v_absmax] = operands.each_ref().map(Framed::flat);
        let norm = self.norm_squared.to_device(p.device());
        match (self.form, p.device()) {
            (Form::Wide, Device::Cpu) => adamw_32bit_reference(&p, copy, &g, &m, &v, &norm, step),
            (Form::Wide, _) => adamw_32bit(&p, copy, &g, &m, &v, &norm, step),
            (Form::Coded, Device::Cpu) => {
                adamw_8bit_reference(&p, copy, &g, (&m, &m_absmax), (&v, &v_absmax), &norm, step)
            }
            (Form::Coded, _) => adamw_8bit(&p, copy, &g, (&m, &m_absmax), (&v, &v_absmax), &norm, step),
        }
    }
}

/// The definition in f64, and the terms that its sums are made of.
struct Exact {
    p: Tensor,
    p_terms: Tensor,
    moments: [Tensor; 2],
    terms: [Tensor; 2],
}

impl Exact {
    fn of(operands: &Operands, step: &AdamWStep) -> Self {
        let norm = operands.norm_squared.double_value(&[0]).sqrt();
        let clipping = step.max_norm / (norm + 1e-6);
        let factor = if step.max_norm > 0.0 { clipping.min(1.0) } else { 1.0 };
        let g = operands.g.to_kind(Kind::Double) * factor;
        let [m_old, v_old] = operands.decoded();
        let m_terms = [m_old * step.beta1, &g * (1.0 - step.beta1)];
        let v = v_old * step.beta2 + g.square() * (1.0 - step.beta2);
        let m = &m_terms[0] + &m_terms[1];
        let m_terms = m_terms[0].abs() + m_terms[1].abs();
        let denominator = v.sqrt() / step.correction2 + step.eps;
        let rate = step.lr / step.correction1;
        let decayed = operands.p.to_kind(Kind::Double) * (1.0 - step.lr * step.weight_decay);
        Self {
            p: &decayed - &m / &denominator * rate,
            p_terms: decayed.abs() + &m_terms / &denominator * rate,
            terms: [m_terms, v.copy()],
            moments: [m, v],
        }
    }
}

fn case(device: Device, operands: &Operands, offset: i64, copied: bool, step: &AdamWStep) -> Result<()> {
    let len = operands.p.size()[0];
    let twin = operands.on(Device::Cpu, 0)?;
    operands.update(&twin, None, step)?;
    let found = operands.on(device, offset)?;
    let copy = Framed::output(Kind::BFloat16, Layout::dense(1, len).at(offset), device)?;
    let copy_view = copied.then(|| copy.flat());
    operands.update(&found, copy_view.as_ref(), step)?;

    let names = ["p", "g", "m", "v", "scales of m", "scales of v"];
    for (operand, name) in found.iter().zip(names) {
        operand.intact(name)?;
    }
    copy.intact("copy")?;
    let [p, g, m, v, m_absmax, v_absmax] = found.each_ref().map(|one| one.flat().to_device(Device::Cpu));
    let [twin_p, _, twin_m, twin_v, twin_m_absmax, twin_v_absmax] = twin.each_ref().map(Framed::flat);
    same("g", &operands.g, &g)?;
    if copied {
        same("copy", &p.to_kind(Kind::BFloat16), &copy.flat().to_device(Device::Cpu))?;
    }
    let exact = Exact::of(operands, step);
    near("p", &p, &exact.p, &twin_p, &exact.p_terms)?;
    let (found, twins) = ([m, v], [twin_m, twin_v]);
    let (absmax, twin_absmax) = ([m_absmax, v_absmax], [twin_m_absmax, twin_v_absmax]);
    for index in [0, 1] {
        let (value, terms) = (&exact.moments[index], &exact.terms[index]);
        if operands.form == Form::Wide {
            near(names[2 + index], &found[index], value, &twins[index], terms)?;
        } else {
            let (scale, scale_terms) = (largest(value), largest(terms));
            near(names[4 + index], &absmax[index], &scale, &twin_absmax[index], &scale_terms)?;
            nearest(&found[index], value, terms, index == 0).context(names[2 + index])?;
        }
    }
    Ok(())
}

fn same(what: &str, wanted: &Tensor, found: &Tensor) -> Result<()> {
    let difference = first_difference(wanted, found);
    ensure!(difference.is_none(), "{what}: {}", difference.unwrap_or_default());
    Ok(())
}

fn near(what: &str, found: &Tensor, value: &Tensor, twin: &Tensor, terms: &Tensor) -> Result<()> {
    Reference { value, twin, terms: Some(terms), halves: 2.0 }.judge(what, found)
}

/// That each code's level is the nearest to the moment over its block's largest, as nearly as f32 can tell.
fn nearest(codes: &Tensor, moment: &Tensor, terms: &Tensor, signed: bool) -> Result<()> {
    let len = moment.size()[0];
    let levels = Tensor::from_slice(&dynamic_map(signed)).to_kind(Kind::Double);
    let midpoints = (levels.narrow(0, 0, 255) + levels.narrow(0, 1, 255)) / 2.0;
    let scale = largest(moment);
    let scale = scale.where_self(&scale.gt(0.0), &scale.ones_like());
    let per_element = |blocks: &Tensor| spread(blocks, len);
    let unit = moment / per_element(&scale); // in [-1, 1]
    let level = |codes: &Tensor| levels.index_select(0, &codes.to_kind(Kind::Int64));
    let best = (&unit - level(&unit.bucketize(&midpoints, false, false))).abs();
    let off = (&unit - level(codes)).abs() - best;
    let noise = terms / per_element(&scale) + unit.abs() * per_element(&(largest(terms) / &scale));
    let beyond = off.gt_tensor(&(noise * NOISE + 1e-10)).nonzero(); // [beyond, 1] i64
    let count = beyond.size()[0];
    if count > 0 {
        let first = beyond.int64_value(&[0, 0]);
        anyhow::bail!(
            "{count} codes are not the nearest, the first is element {first}: {} for {:e}",
            codes.int64_value(&[first]),
            unit.double_value(&[first])
        );
    }
    Ok(())
}

/// Largest magnitude of each block of 256, `[blocks]`.
fn largest(values: &Tensor) -> Tensor {
    let missing = blocks_of(values.size()[0]) * BLOCK - values.size()[0];
    values.abs().constant_pad_nd([0, missing]).view([-1, BLOCK]).amax([1i64].as_slice(), false)
}

/// Each block's number for each of its elements, `[len]`.
fn spread(blocks: &Tensor, len: i64) -> Tensor {
    blocks.repeat_interleave_self_int(BLOCK, 0, None).narrow(0, 0, len)
}

/// Gradients that are no numbers change nothing.
fn spoilt_gradients(device: Device, form: Form) -> Result<()> {
    for norm in [f64::NAN, f64::INFINITY] {
        let operands = Operands { norm_squared: Tensor::from_slice(&[norm]), ..Operands::random(form, 1000) };
        let found = operands.on(device, 0)?;
        operands.update(&found, None, &step(1.0))?;
        let before = operands.on(Device::Cpu, 0)?;
        for (now, before) in found.iter().zip(&before) {
            same("what a spoilt gradient leaves", &before.flat(), &now.flat().to_device(Device::Cpu))?;
        }
    }
    Ok(())
}

/// All but gradient and norm in the host's pinned memory: the same bits.
fn in_host_memory(device: Device, form: Form) -> Result<()> {
    let operands = Operands::random(form, 100_003);
    let pinned = |tensor: &Tensor| -> Result<Tensor> {
        if !device.is_cuda() {
            return Ok(tensor.copy());
        }
        let host = bridge::pinned(&tensor.size(), tensor.kind())?;
        host.shallow_clone().f_copy_(tensor)?;
        Ok(host)
    };
    let updated = |place: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<[Tensor; 6]> {
        let Operands { p, moments: [m, v], absmax: [m_absmax, v_absmax], .. } = &operands;
        let (g, norm) = (operands.g.f_to_device(device)?, operands.norm_squared.f_to_device(device)?);
        let copy = place(&Tensor::zeros([p.size()[0]], (Kind::BFloat16, Device::Cpu)))?;
        let [p, m, v] = [place(p)?, place(m)?, place(v)?];
        // Without codes there are no scales, and no memory for them.
        let scales = |tensor: &Tensor| if form == Form::Coded { place(tensor) } else { Ok(tensor.copy()) };
        let [m_absmax, v_absmax] = [scales(m_absmax)?, scales(v_absmax)?];
        match form {
            Form::Wide => adamw_32bit(&p, Some(&copy), &g, &m, &v, &norm, &step(0.7))?,
            Form::Coded => {
                adamw_8bit(&p, Some(&copy), &g, (&m, &m_absmax), (&v, &v_absmax), &norm, &step(0.7))?;
            }
        }
        // The host may look once the GPU is done.
        let _ = norm.f_double_value(&[0])?;
        Ok([p, copy, m, v, m_absmax, v_absmax].map(|tensor| tensor.to_device(Device::Cpu)))
    };
    let on_device = updated(&|tensor| Ok(tensor.copy().f_to_device(device)?))?;
    let on_host = updated(&pinned)?;
    let names = ["p", "copy", "m", "v", "scales of m", "scales of v"];
    names
        .iter()
        .zip(on_device.iter().zip(&on_host))
        .try_for_each(|(name, (wanted, found))| same(name, wanted, found))
}

/// Over 64 Mi parameters with their copy.
pub(super) fn rate(device: Device, form: Form) -> Result<f64> {
    let len: i64 = 64 << 20;
    let floats = || -> Result<Tensor> { Ok(Tensor::f_zeros([len], (Kind::Float, device))?) };
    let (p, g) = (floats()?, floats()?.normal_(0.0, 1.0));
    let copy = Tensor::f_zeros([len], (Kind::BFloat16, device))?;
    let norm = Tensor::from_slice(&[1.0]).to_device(device);
    let step = step(0.5);
    match form {
        Form::Wide => {
            let (m, v) = (floats()?, floats()?);
            bandwidth(device, 30 * len, 1, |_| adamw_32bit(&p, Some(&copy), &g, &m, &v, &norm, &step))
        }
        Form::Coded => {
            let (m, v) = (zero_codes(len, true, device), zero_codes(len, false, device));
            let bytes = 18 * len + 16 * blocks_of(len);
            bandwidth(device, bytes, 1, |_| {
                adamw_8bit(&p, Some(&copy), &g, (&m.0, &m.1), (&v.0, &v.1), &norm, &step)
            })
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn the_twins_pass_their_own_check() {
        for form in [Form::Wide, Form::Coded] {
            assert_eq!(cases(Device::Cpu, form, &[1, 3, 257, 4697]).unwrap(), 26, "{form:?}");
        }
    }

    #[test]
    fn a_neighbouring_code_is_found() {
        let moment = Tensor::randn([600], (Kind::Double, Device::Cpu));
        let codes = Tensor::zeros([600], (Kind::Uint8, Device::Cpu));
        let absmax = Tensor::zeros([3], (Kind::Float, Device::Cpu));
        let (v, zero) =
            (zero_codes(600, false, Device::Cpu), Tensor::zeros([1], (Kind::Double, Device::Cpu)));
        // With a decay of 0 the first moment is the gradient.
        let step = AdamWStep { beta1: 0.0, ..step(0.0) };
        let g = moment.to_kind(Kind::Float);
        adamw_8bit_reference(&g.copy(), None, &g, (&codes, &absmax), (&v.0, &v.1), &zero, &step).unwrap();
        let exact = g.to_kind(Kind::Double);
        nearest(&codes, &exact, &exact.abs(), true).unwrap();
        let one = codes.get(417);
        let _ = one.shallow_clone().fill_(if one.int64_value(&[]) > 127 {
            one.int64_value(&[]) - 1
        } else {
            128
        });
        let told = nearest(&codes, &exact, &exact.abs(), true).unwrap_err().to_string();
        assert!(told.starts_with("1 codes are not the nearest, the first is element 417"), "{told}");
    }
}
