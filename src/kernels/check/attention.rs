//! Attention, forward and backward, with each of our kernels that the GPU can run.
//!
//! Lengths at and around the bounds of tiles, packs of many lengths, one long sequence; heads of 64 and 128, groups of 1 to 8;
//! operands of their own and in packed rows. The backward pass is given the output and the log-sum-exp of the definition,
//! so that it is judged alone. Beside nearness: the same bits at every run, no number where a sequence holds none and nowhere
//! else, tickets and semaphores at rest after every launch.

mod definition;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use self::definition::{Backward, Forward, Problem};
use super::inputs::Flavour;
use super::tolerance::{Framed, Layout};
use super::{Check, Checks, Outcome};
use crate::kernels::attention::{
    AttentionKernel, AttentionPlan, AttentionScratch, AttentionShape, attention_backward_into,
    attention_backward_reference, attention_into, attention_reference,
};
use crate::progress;

/// The checks of this module.
pub(super) fn checks(checks: &mut Checks<'_>) {
    checks.together(CHECKS.as_flattened(), |device, short| match Run::new(device, short) {
        Ok(mut run) => {
            run.all();
            run.checks()
        }
        Err(error) => vec![Check::new(CHECKS[0][0], Err(error), false)],
    });
}

/// Of Hopper's kernels and of those for every GPU.
const CHECKS: [[&str; 2]; 2] =
    [["attention_hopper_forward", "attention_hopper_backward"], ["attention_forward", "attention_backward"]];

/// What operands hold.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Holds {
    /// Mean 0, variance 1.
    Normal,
    /// One value throughout, but for the gradient of the output.
    Constant,
    /// Scores of hundreds: a row sees one key, or two.
    Saturated,
    /// Values and gradients of 10⁴.
    Large,
    /// Queries and keys of 10⁴. Forward alone: f32 does not hold the log-sum-exp of such scores nearly enough to find the
    /// probabilities again.
    Huge,
}

const ALL: [Holds; 5] = [Holds::Normal, Holds::Constant, Holds::Saturated, Holds::Large, Holds::Huge];

/// Query heads and key heads.
const GROUPS: [[i64; 2]; 4] = [[2, 2], [6, 2], [4, 1], [8, 1]];

const HEAD_DIMS: [i64; 2] = [64, 128];

const SHORT: [i64; 8] = [1, 2, 63, 64, 65, 127, 128, 129];
const LONG: [i64; 3] = [4095, 4096, 4097];
const LONGEST: i64 = 32_768;

/// Random packs, and how many of them are a short check.
const PACKS: [usize; 2] = [100, 6];

/// Launches that must give the same bits.
const REPEATS: usize = 50;

/// Lengths of a short check.
const FEW: [i64; 3] = [1, 65, 129];

/// One comparison.
#[derive(Debug, Clone)]
struct Case {
    lengths: Vec<i64>,
    heads: [i64; 2],
    head_dim: i64,
    holds: Holds,
    /// Whether queries, keys and values lie in the same rows, and gradients too.
    packed: bool,
}

impl Case {
    fn shape(&self) -> AttentionShape {
        AttentionShape { heads: self.heads[0], kv_heads: self.heads[1], head_dim: self.head_dim }
    }

    fn tokens(&self) -> i64 {
        self.lengths.iter().sum()
    }

    fn cu_seqlens(&self) -> Vec<i64> {
        let mut at = 0;
        let ends = self.lengths.iter().map(|length| {
            at += length;
            at
        });
        std::iter::once(0).chain(ends).collect()
    }

    /// Where `count` heads of tokens lie.
    fn layout(&self, count: i64) -> Layout {
        let dense = Layout::dense(self.tokens(), count * self.head_dim);
        if self.packed { dense.strided(dense.columns + 24).at(8) } else { dense }
    }

    fn values(&self, count: i64, by: f64, device: Device) -> Tensor {
        let flavour = if self.holds == Holds::Constant { Flavour::Constant } else { Flavour::Normal };
        flavour.matrix(self.tokens(), count * self.head_dim, device) * by
    }
}

/// A pass's operands in frames.
struct Operands {
    frames: Vec<Framed>,
    /// Queries, keys, values `[tokens, heads, head_dim]`.
    qkv: [Tensor; 3],
}

impl Operands {
    /// Holding `values` `[tokens, heads · head_dim]` each, or poison.
    fn new(case: &Case, values: Option<[&Tensor; 3]>, device: Device) -> Result<Self> {
        let [heads, kv_heads] = case.heads;
        let counts = [heads, kv_heads, kv_heads];
        let framed = |count: i64, values: Option<&Tensor>| match values {
            Some(values) => Framed::input(values, case.layout(count)),
            None => Framed::output(Kind::BFloat16, case.layout(count), device),
        };
        let by_head = |x: &Tensor, count: i64| x.unflatten(1, [count, case.head_dim]);
        if case.packed {
            let together = values.map(|values| Tensor::cat(&values, 1));
            let frame = framed(counts.iter().sum(), together.as_ref())?;
            let rows = frame.view();
            let part = |first: i64, count: i64| {
                by_head(&rows.narrow(1, first * case.head_dim, count * case.head_dim), count)
            };
            let qkv = [part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads)];
            return Ok(Self { frames: vec![frame], qkv });
        }
        let mut frames = Vec::new();
        for (index, count) in counts.into_iter().enumerate() {
            frames.push(framed(count, values.map(|values| values[index]))?);
        }
        let views: Vec<Tensor> =
            frames.iter().zip(counts).map(|(frame, count)| by_head(&frame.view(), count)).collect();
        let qkv = views.try_into().map_err(|_| anyhow::anyhow!("three operands"))?;
        Ok(Self { frames, qkv })
    }

    fn intact(&self, what: &str) -> Result<()> {
        self.frames.iter().try_for_each(|frame| frame.intact(what))
    }

    fn each(&self) -> [&Tensor; 3] {
        self.qkv.each_ref()
    }
}

/// A case with its operands and its definition, for all kernels.
struct Posed {
    case: Case,
    operands: Operands,
    d_o: Framed,
    problem: Problem,
    forward: Forward,
    /// The output and log-sum-exp of the definition as a backward pass gets them, and what it must give.
    given: Framed,
    given_lse: Tensor,
    backward: Option<Backward>,
    /// Output and gradients by the twins, where they do not take too much memory.
    twins: Option<[Tensor; 4]>,
}

impl Posed {
    fn new(case: &Case, device: Device) -> Result<Self> {
        let [heads, kv_heads] = case.heads;
        let (scores, values) = match case.holds {
            Holds::Saturated => (6.0, 1.0),
            Holds::Large => (1.0, 1e4),
            Holds::Huge => (1e4, 1.0),
            Holds::Normal | Holds::Constant => (1.0, 1.0),
        };
        let parts = [
            case.values(heads, scores, device),
            case.values(kv_heads, scores, device),
            case.values(kv_heads, values, device),
        ];
        let d_o = Flavour::Normal.matrix(case.tokens(), heads * case.head_dim, device) * values;
        let operands = Operands::new(case, Some(parts.each_ref()), device)?;
        let d_o = Framed::input(&d_o, case.layout(heads))?;
        let [q, k, v] = operands.each().map(Tensor::copy);
        let problem = Problem {
            q,
            k,
            v,
            d_o: by_head(&d_o, case).copy(),
            cu_seqlens: case.cu_seqlens(),
            scale: 1.0 / (case.head_dim as f64).sqrt(),
            alike: case.holds == Holds::Constant,
        };
        let forward = definition::forward(&problem);
        let o = forward.o.value.to_kind(Kind::BFloat16);
        let backward = (case.holds != Holds::Huge).then(|| definition::backward(&problem, &o));
        let longest = case.lengths.iter().max().copied().unwrap_or(0);
        let twins = (longest < 5000).then(|| twins(&problem, &o));
        let given = Framed::input(&o, case.layout(heads))?;
        let given_lse = forward.lse.value.to_kind(Kind::Float).contiguous();
        Ok(Self { case: case.clone(), operands, d_o, problem, forward, given, given_lse, backward, twins })
    }

    fn twin(&self, index: usize) -> Option<&Tensor> {
        self.twins.as_ref().map(|twins| &twins[index])
    }

    fn check_forward(&self, plan: &AttentionPlan) -> Result<()> {
        let Self { case, operands, problem, forward, .. } = self;
        let (o, lse) = outputs(case, self.given_lse.device())?;
        let lse_rows = lse.flat().view([case.heads[0], case.tokens()]);
        attention_into(operands.each(), plan, problem.scale, &by_head(&o, case), &lse_rows)?;
        operands.intact("q, k, v").and_then(|()| o.intact("o")).and_then(|()| lse.intact("lse"))?;
        ensure!(plan.is_at_rest()?, "a ticket is still out");
        forward.lse.judge("lse", &lse_rows, None)?;
        forward.o.judge("o", &by_head(&o, case), self.twin(0))
    }

    fn check_backward(&self, plan: &AttentionPlan) -> Result<()> {
        let Some(wanted) = &self.backward else { return Ok(()) };
        let Self { case, operands, problem, .. } = self;
        let device = self.given_lse.device();
        let gradients = Operands::new(case, None, device)?;
        let scratch = AttentionScratch::new(case.shape(), case.tokens(), case.lengths.len() as i64, device)?;
        scratch.poison()?;
        let (d_o, o) = (by_head(&self.d_o, case), by_head(&self.given, case));
        let lse = &self.given_lse;
        let to = gradients.each();
        attention_backward_into(&d_o, operands.each(), &o, lse, plan, problem.scale, &scratch, to)?;
        operands.intact("q, k, v").and_then(|()| gradients.intact("dq, dk, dv"))?;
        self.d_o.intact("d_o")?;
        ensure!(plan.is_at_rest()?, "a ticket is still out");
        ensure!(scratch.is_at_rest()?, "a semaphore is not 0");
        wanted.dv.judge("dv", to[2], self.twin(3))?;
        wanted.dk.judge("dk", to[1], self.twin(2))?;
        wanted.dq.judge("dq", to[0], self.twin(1))
    }
}

/// A framed operand with the query heads.
fn by_head(frame: &Framed, case: &Case) -> Tensor {
    frame.view().unflatten(1, [case.heads[0], case.head_dim])
}

fn outputs(case: &Case, device: Device) -> Result<(Framed, Framed)> {
    let o = Framed::output(Kind::BFloat16, case.layout(case.heads[0]), device)?;
    let lse = Framed::output(Kind::Float, Layout::dense(1, case.heads[0] * case.tokens()), device)?;
    Ok((o, lse))
}

fn twins(problem: &Problem, o: &Tensor) -> [Tensor; 4] {
    let Problem { q, k, v, d_o, cu_seqlens, scale, .. } = problem;
    let (dq, dk, dv) = attention_backward_reference(d_o, q, k, v, o, cu_seqlens, *scale);
    [attention_reference(q, k, v, cu_seqlens, *scale), dq, dk, dv]
}

/// Output and gradients `[o, dq, dk, dv]` by libtorch's autograd in f64, on the CPU.
fn autograd(problem: &Problem) -> [Tensor; 4] {
    let leaf = |x: &Tensor| x.to_device(Device::Cpu).to_kind(Kind::Double).copy().set_requires_grad(true);
    let (q, k, v) = (leaf(&problem.q), leaf(&problem.k), leaf(&problem.v));
    let group = q.size()[1] / k.size()[1];
    let bounds = problem.cu_seqlens.windows(2).map(|pair| (pair[0], pair[1] - pair[0]));
    let parts: Vec<Tensor> = bounds
        .filter(|(_, length)| *length > 0)
        .map(|(start, length)| {
            let rows = |x: &Tensor| x.narrow(0, start, length).transpose(0, 1);
            let [k, v] = [&k, &v].map(|x| rows(x).repeat_interleave_self_int(group, 0, None));
            let hidden = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).triu(1);
            let scores = rows(&q).bmm(&k.transpose(1, 2)) * problem.scale;
            let p = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Double);
            p.bmm(&v).transpose(0, 1)
        })
        .collect();
    let o = Tensor::cat(&parts, 0);
    let d_o = problem.d_o.to_device(Device::Cpu).to_kind(Kind::Double);
    (&o * d_o).sum(Kind::Double).backward();
    [o.detach(), q.grad(), k.grad(), v.grad()]
}

/// One kernel's two passes and what became of them.
struct Judged {
    kernel: AttentionKernel,
    passes: [Tally; 2],
}

#[derive(Default)]
struct Tally {
    cases: usize,
    failed: usize,
    /// Of the first few.
    words: Vec<String>,
}

/// Failures that are told in full.
const TOLD: usize = 4;

impl Tally {
    fn add(&mut self, outcome: Result<()>, described: impl FnOnce() -> String) {
        self.cases += 1;
        if let Err(error) = outcome {
            self.failed += 1;
            if self.words.len() < TOLD {
                self.words.push(format!("{}: {error:#}", described()));
            }
        }
    }

    fn outcome(self) -> Result<Outcome> {
        if self.failed > 0 {
            bail!("{} of {} cases: {}", self.failed, self.cases, self.words.join("; "));
        }
        Ok(Outcome::near(self.cases))
    }
}

struct Run {
    device: Device,
    short: bool,
    judged: Vec<Judged>,
    watch: Watch,
}

impl Run {
    fn new(device: Device, short: bool) -> Result<Self> {
        let kernels = AttentionKernel::ours(device, HEAD_DIMS[0])?;
        let judged = kernels.into_iter().map(|kernel| Judged { kernel, passes: Default::default() });
        Ok(Self { device, short, judged: judged.collect(), watch: Watch::new() })
    }

    fn checks(self) -> Vec<Check> {
        let mut checks = Vec::new();
        for Judged { kernel, passes: [forward, backward] } in self.judged {
            let names = match kernel {
                AttentionKernel::Hopper => CHECKS[0],
                _ => CHECKS[1],
            };
            checks.push(Check::new(names[0], forward.outcome(), false));
            checks.push(Check::new(names[1], backward.outcome(), false));
        }
        checks
    }

    /// Smaller cases come first: what is wrong shows in the simplest that has it.
    fn all(&mut self) {
        let lengths: &[i64] = if self.short { &FEW } else { &SHORT };
        for length in lengths {
            self.single(*length, !self.short);
        }
        for _ in 0..PACKS[usize::from(self.short)] {
            self.case(&random_pack());
        }
        self.against_autograd();
        self.on_its_own("no number in a sequence", no_number);
        if self.short {
            return self.on_its_own("nothing to do", nothing_to_do);
        }
        self.on_its_own("repeats", repeats);
        self.on_its_own("nothing to do", nothing_to_do);
        for length in LONG {
            self.single(length, false);
        }
        for head_dim in HEAD_DIMS {
            let heads = [2, 1];
            let lengths = vec![LONGEST];
            self.case(&Case { lengths, heads, head_dim, holds: Holds::Normal, packed: true });
        }
    }

    /// One sequence with heads of each size and number; all that operands may hold and both layouts, or one after the other.
    fn single(&mut self, length: i64, every: bool) {
        let shapes = HEAD_DIMS.into_iter().flat_map(|head_dim| GROUPS.map(|heads| (head_dim, heads)));
        for (turn, (head_dim, heads)) in shapes.enumerate() {
            let kinds = ALL.into_iter().flat_map(|holds| [(holds, false), (holds, true)]);
            for (index, (holds, packed)) in kinds.enumerate() {
                if every || index % ALL.len() == turn % ALL.len() {
                    self.case(&Case { lengths: vec![length], heads, head_dim, holds, packed });
                }
            }
        }
    }

    fn case(&mut self, case: &Case) {
        let Self { device, judged, watch, .. } = self;
        let posed = Posed::new(case, *device);
        for Judged { kernel, passes } in judged {
            let described = |pass: &str| format!("{pass} {case:?}");
            let plan = || AttentionPlan::with(*kernel, &case.cu_seqlens(), case.shape(), *device);
            for (pass, name, check) in [
                (0, "forward", Posed::check_forward as fn(&Posed, &AttentionPlan) -> Result<()>),
                (1, "backward", Posed::check_backward),
            ] {
                watch.begin(|| format!("{} {}", kernel.name(), described(name)));
                let outcome = match &posed {
                    Ok(posed) => plan().and_then(|plan| check(posed, &plan)),
                    Err(error) => Err(anyhow::anyhow!("the definition failed: {error:#}")),
                };
                passes[pass].add(outcome, || described(name));
            }
        }
        watch.end();
    }

    /// Small packs against gradients that nobody here wrote out.
    fn against_autograd(&mut self) {
        for (lengths, heads, head_dim) in
            [(vec![17, 130], [4, 2], 64), (vec![200, 0, 1, 70], [3, 1], 128), (vec![129], [2, 2], 128)]
        {
            let case = Case { lengths, heads, head_dim, holds: Holds::Normal, packed: true };
            let Self { device, judged, watch, .. } = self;
            for Judged { kernel, passes } in judged {
                watch.begin(|| format!("{} against autograd, {case:?}", kernel.name()));
                let outcome = near_autograd(*kernel, &case, *device);
                passes[1].add(outcome, || format!("against autograd, {case:?}"));
            }
            watch.end();
        }
    }

    fn on_its_own(&mut self, what: &str, check: fn(AttentionKernel, &Case, Device, bool) -> Result<()>) {
        for head_dim in HEAD_DIMS {
            let lengths = vec![300, 1500, 0, 77, 1, 1025];
            let case = Case { lengths, heads: [8, 4], head_dim, holds: Holds::Normal, packed: true };
            let Self { device, judged, watch, .. } = self;
            for Judged { kernel, passes } in judged {
                for (backward, tally) in [false, true].into_iter().zip(passes) {
                    watch.begin(|| format!("{} {what}, heads of {head_dim}", kernel.name()));
                    let outcome = check(*kernel, &case, *device, backward);
                    tally.add(outcome, || format!("{what}, heads of {head_dim}"));
                }
            }
            watch.end();
        }
    }
}

/// Up to seven sequences, some of them empty or of one token, most at the bounds of tiles or of any length.
fn random_pack() -> Case {
    let below = |bound: i64| Tensor::randint(bound, [1], (Kind::Int64, Device::Cpu)).int64_value(&[0]);
    let length = |_| match below(6) {
        0 => 0,
        1 => 1,
        2 => 64 * (1 + below(6)) + below(3) - 1,
        3 => below(64),
        _ => below(900),
    };
    let mut lengths: Vec<i64> = (0..=below(7)).map(length).collect();
    // Nothing at all is checked elsewhere.
    lengths.push(1 + below(200));
    Case {
        lengths,
        heads: GROUPS[below(GROUPS.len() as i64) as usize],
        head_dim: HEAD_DIMS[below(2) as usize],
        holds: ALL[below(ALL.len() as i64) as usize],
        packed: below(2) == 0,
    }
}

/// Both passes of a kernel: output, log-sum-exp, gradients, all dense and new.
fn passes(
    kernel: AttentionKernel,
    case: &Case,
    [q, k, v, d_o]: [&Tensor; 4],
    scratch: &AttentionScratch,
) -> Result<[Tensor; 5]> {
    let plan = AttentionPlan::with(kernel, &case.cu_seqlens(), case.shape(), q.device())?;
    let scale = 1.0 / (case.head_dim as f64).sqrt();
    let o = q.f_full_like(f64::NAN)?;
    let lse = Tensor::f_full([case.heads[0], case.tokens()], f64::NAN, (Kind::Float, q.device()))?;
    attention_into([q, k, v], &plan, scale, &o, &lse)?;
    let [dq, dk, dv] = [q.f_full_like(f64::NAN)?, k.f_full_like(f64::NAN)?, v.f_full_like(f64::NAN)?];
    attention_backward_into(d_o, [q, k, v], &o, &lse, &plan, scale, scratch, [&dq, &dk, &dv])?;
    ensure!(plan.is_at_rest()? && scratch.is_at_rest()?, "a ticket or a semaphore is not at rest");
    Ok([o, lse, dq, dk, dv])
}

/// New operands `[q, k, v, d_o]`.
fn operands(case: &Case, device: Device) -> [Tensor; 4] {
    let [heads, kv_heads] = case.heads;
    [heads, kv_heads, kv_heads, heads].map(|count| {
        Flavour::Normal.matrix(case.tokens(), count * case.head_dim, device).view([
            case.tokens(),
            count,
            case.head_dim,
        ])
    })
}

fn scratch_of(case: &Case, device: Device) -> Result<AttentionScratch> {
    let scratch = AttentionScratch::new(case.shape(), case.tokens(), case.lengths.len() as i64, device)?;
    scratch.poison()?;
    Ok(scratch)
}

fn near_autograd(kernel: AttentionKernel, case: &Case, device: Device) -> Result<()> {
    let [q, k, v, d_o] = operands(case, device);
    let found = passes(kernel, case, [&q, &k, &v, &d_o], &scratch_of(case, device)?)?;
    let scale = 1.0 / (case.head_dim as f64).sqrt();
    let problem = Problem { q, k, v, d_o, cu_seqlens: case.cu_seqlens(), scale, alike: false };
    let wanted = autograd(&problem);
    for ((what, found), wanted) in
        [("o", &found[0]), ("dq", &found[2]), ("dk", &found[3]), ("dv", &found[4])].into_iter().zip(&wanted)
    {
        let error = found.to_device(Device::Cpu).to_kind(Kind::Double) - wanted;
        let relative = (error.norm() / wanted.norm()).double_value(&[]);
        // Operands of products are rounded to 8 bits, which is off by 0.17 % of their norm; so are results.
        ensure!(relative < 5e-3, "{what} is {relative:.2e} of its norm from libtorch's autograd in f64");
    }
    Ok(())
}

/// What holds no number in one sequence, or in one query row, is seen there alone.
fn no_number(kernel: AttentionKernel, case: &Case, device: Device, backward: bool) -> Result<()> {
    let scratch = scratch_of(case, device)?;
    let all = operands(case, device);
    let clean = passes(kernel, case, all.each_ref(), &scratch)?;
    let (start, length) = (case.lengths[0], case.lengths[1]);
    let spoilt = all.each_ref().map(Tensor::copy);
    for operand in &spoilt {
        let _ = operand.narrow(0, start, length).f_fill_(f64::NAN)?;
    }
    let found = passes(kernel, case, spoilt.each_ref(), &scratch)?;
    let checked: &[usize] = if backward { &[2, 3, 4] } else { &[0, 1] };
    for &index in checked {
        let name = NAMES[index];
        // Tokens are the second dimension of lse.
        let dimension = i64::from(index == 1);
        let inside = found[index].narrow(dimension, start, length);
        ensure!(bool::try_from(&inside.isnan().all())?, "{name} is a number where its sequence holds none");
        for (from, count) in [(0, start), (start + length, case.tokens() - start - length)] {
            let [a, b] = [&clean[index], &found[index]].map(|x| x.narrow(dimension, from, count));
            ensure!(a.equal(&b), "{name} of another sequence changed");
        }
    }
    if backward {
        return Ok(());
    }
    // A row in the middle of a tile, one head.
    let (token, head) = (start + 700, 5);
    let spoilt = all.each_ref().map(Tensor::copy);
    let _ = spoilt[0].get(token).get(head).get(3).f_fill_(f64::NAN)?;
    let found = passes(kernel, case, spoilt.each_ref(), &scratch)?;
    let mut wanted = clean[0].copy();
    let _ = wanted.get(token).get(head).f_fill_(f64::NAN)?;
    let differs = wanted.isnan().not_equal_tensor(&found[0].isnan());
    ensure!(
        differs.count_nonzero(None).int64_value(&[]) == 0,
        "a query without a number made other rows no numbers, or not all of its own"
    );
    wanted = wanted.nan_to_num(0.0, 0.0, 0.0);
    ensure!(wanted.equal(&found[0].nan_to_num(0.0, 0.0, 0.0)), "a query without a number changed other rows");
    Ok(())
}

const NAMES: [&str; 5] = ["o", "lse", "dq", "dk", "dv"];

/// The same bits every time.
fn repeats(kernel: AttentionKernel, case: &Case, device: Device, backward: bool) -> Result<()> {
    let scratch = scratch_of(case, device)?;
    let all = operands(case, device);
    let first = passes(kernel, case, all.each_ref(), &scratch)?;
    let checked = if backward { 2..5 } else { 0..2 };
    for repeat in 1..REPEATS {
        let again = passes(kernel, case, all.each_ref(), &scratch)?;
        for index in checked.clone() {
            ensure!(again[index].equal(&first[index]), "{} differs in run {repeat}", NAMES[index]);
        }
    }
    Ok(())
}

/// Batches without a token are no launch.
fn nothing_to_do(kernel: AttentionKernel, case: &Case, device: Device, _backward: bool) -> Result<()> {
    let empty = Case { lengths: vec![0, 0], ..case.clone() };
    let scratch = AttentionScratch::new(empty.shape(), 0, 0, device)?;
    let all = operands(&empty, device);
    passes(kernel, &empty, all.each_ref(), &scratch).map(|_| ()).context("without a token")
}

/// Tells of a case that does not end: a tile that waits for one that never runs would say nothing.
struct Watch(Arc<Mutex<Watched>>);

#[derive(Default)]
struct Watched {
    /// Since when, and what.
    under_way: Option<(Instant, String)>,
    told: bool,
    over: bool,
}

/// Longer than any case takes.
const PATIENCE: Duration = Duration::from_secs(20);

impl Watch {
    fn new() -> Self {
        let watched = Arc::new(Mutex::new(Watched::default()));
        let seen = watched.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(500));
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                if seen.over {
                    return;
                }
                if let Some((since, what)) = &seen.under_way
                    && since.elapsed() > PATIENCE
                    && !seen.told
                {
                    progress::note(format!("does not end: {what}"));
                    seen.told = true;
                }
            }
        });
        Self(watched)
    }

    fn begin(&self, what: impl FnOnce() -> String) {
        let mut watched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *watched = Watched { under_way: Some((Instant::now(), what())), ..Watched::default() };
    }

    fn end(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).under_way = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).over = true;
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn operands_lie_in_packed_rows_or_on_their_own() {
        for packed in [false, true] {
            let case =
                Case { lengths: vec![3, 0, 4], heads: [4, 2], head_dim: 64, holds: Holds::Normal, packed };
            let posed = Posed::new(&case, Device::Cpu).unwrap();
            let [q, k, v] = posed.operands.each();
            assert_eq!((q.size(), k.size(), v.size()), (vec![7, 4, 64], vec![7, 2, 64], vec![7, 2, 64]));
            assert_eq!(q.stride()[0], if packed { 8 * 64 + 24 } else { 4 * 64 });
            assert_eq!(q.data_ptr() as usize % 16, 0);
            assert!(posed.problem.v.equal(v));
            posed.operands.intact("q, k, v").unwrap();
            let empty = Operands::new(&case, None, Device::Cpu).unwrap();
            assert!(bool::try_from(&empty.each()[1].isnan().all()).unwrap());
        }
    }

    #[test]
    fn failures_are_counted_and_the_first_are_told() {
        let mut tally = Tally::default();
        for index in 0..9 {
            let outcome = if index % 2 == 0 { Err(anyhow::anyhow!("wrong")) } else { Ok(()) };
            tally.add(outcome, || format!("case {index}"));
        }
        let told = tally.outcome().err().unwrap().to_string();
        assert_eq!(told, "5 of 9 cases: case 0: wrong; case 2: wrong; case 4: wrong; case 6: wrong");
    }

    /// What a kernel computes that rounds where ours do, `[o, lse, dq, dk, dv]`, of one sequence.
    fn imitation(posed: &Posed) -> [Tensor; 5] {
        let Problem { q, k, v, d_o, scale, .. } = &posed.problem;
        let group = q.size()[1] / k.size()[1];
        let wide = |x: &Tensor| x.to_kind(Kind::Float).transpose(0, 1);
        let shared = |x: &Tensor| wide(x).repeat_interleave_self_int(group, 0, None);
        let rounded = |x: &Tensor| x.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let narrow = |x: &Tensor| x.transpose(0, 1).to_kind(Kind::BFloat16);
        let (q, k, v, d_o, o) =
            (wide(q), shared(k), shared(v), wide(d_o), wide(&by_head(&posed.given, &posed.case)));
        let length = q.size()[1];
        let future = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).triu(1);
        let scores = q.bmm(&k.transpose(1, 2)).masked_fill(&future, f64::NEG_INFINITY);
        let by = scale * std::f64::consts::LOG2_E;
        let largest = scores.amax([-1i64].as_slice(), true);
        let p = (&scores * by - &largest * by).exp2();
        let sum = p.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
        let found_o = rounded(&p).bmm(&v) / &sum;
        let lse = ((&largest * by + sum.log2()) * std::f64::consts::LN_2).squeeze_dim(-1);

        let lse2 = (&posed.given_lse * std::f64::consts::LOG2_E).unsqueeze(-1);
        let p = (&scores * by - lse2).exp2();
        let delta = (&d_o * o).sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
        let ds = rounded(&(&p * (d_o.bmm(&v.transpose(1, 2)) - delta)));
        let own = |x: Tensor| {
            let width = x.size()[2];
            x.view([-1, group, length, width]).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
        };
        let dq = ds.bmm(&k) * *scale;
        let dk = own(ds.transpose(1, 2).bmm(&q)) * *scale;
        let dv = own(rounded(&p).transpose(1, 2).bmm(&d_o));
        [narrow(&found_o), lse, narrow(&dq), narrow(&dk), narrow(&dv)]
    }

    /// A kernel that is right passes, so what fails is wrong.
    #[test]
    fn roundings_of_a_kernel_are_forgiven() {
        tch::manual_seed(5);
        for length in [1, 2, 64, 129, 700] {
            for holds in ALL {
                for (heads, head_dim) in [([6, 2], 64), ([4, 1], 128)] {
                    let case = Case { lengths: vec![length], heads, head_dim, holds, packed: true };
                    let posed = Posed::new(&case, Device::Cpu).unwrap();
                    let [o, lse, dq, dk, dv] = imitation(&posed);
                    let described = format!("{case:?}");
                    let judged = |outcome: Result<()>| outcome.with_context(|| described.clone()).unwrap();
                    judged(posed.forward.lse.judge("lse", &lse, None));
                    judged(posed.forward.o.judge("o", &o, posed.twin(0)));
                    if let Some(wanted) = &posed.backward {
                        judged(wanted.dq.judge("dq", &dq, posed.twin(1)));
                        judged(wanted.dk.judge("dk", &dk, posed.twin(2)));
                        judged(wanted.dv.judge("dv", &dv, posed.twin(3)));
                    }
                }
            }
        }
    }

    #[test]
    fn packs_have_tokens_and_every_kind_of_operand_is_posed() {
        for holds in ALL {
            let case = Case { holds, lengths: vec![70, 0, 3], ..random_pack() };
            let posed = Posed::new(&case, Device::Cpu).unwrap();
            assert_eq!(posed.backward.is_none(), holds == Holds::Huge);
            // What the twin finds is near enough, so a kernel can be.
            let found = posed.twin(0).unwrap();
            posed.forward.o.judge("o", found, None).unwrap();
        }
        assert!((0..50).all(|_| random_pack().tokens() > 0));
    }
}
