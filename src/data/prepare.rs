//! The way from dumps to packed rows, stage by stage.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use indicatif::ProgressBar;
use rayon::prelude::*;

use super::audit::{self, MaskAudit};
use super::clean::Cleaned;
use super::example::{Example, Role};
use super::fit::{Fitted, fit};
use super::manifest::{Counts, FORMAT_VERSION, Manifest, SourceReport, SplitReport};
use super::mixture::{Demand, order, quotas, shortfall};
use super::pack::pack;
use super::screen::{Finding, Links, Screened, screen};
use super::source::card::SourceCard;
use super::source::{Collected, Reason, collect};
use super::split::split_of;
use super::store::{Lineage, PackedRow, Split};
use super::tokenizer::{ChatTokenizer, TokenizerFiles};
use crate::error::render;
use crate::model::batch::Sequence;
use crate::progress;
use crate::recipe::{OnShortfall, Recipe};

/// A dataset that is ready to be written.
#[derive(Debug)]
pub struct Prepared {
    /// What it says about itself.
    pub manifest: Manifest,
    /// Packed rows, trained on and held out.
    pub rows: [(Split, Vec<PackedRow>); 2],
    /// Where each example came from.
    pub examples: Vec<Lineage>,
    /// Every duplicate and contaminated example.
    pub findings: Vec<Finding>,
    /// Seconds of each stage.
    pub seconds: Vec<(&'static str, f64)>,
}

/// Findings of each kind that a source's report shows; `screened.jsonl` has all.
const SHOWN: usize = 5;

/// An example on its way into a row.
struct Taken {
    lineage: Lineage,
    sequence: Sequence,
    responses: usize,
}

/// What a source gave.
struct Sampled {
    report: SourceReport,
    taken: Vec<Taken>,
}

/// Seconds of each stage.
struct Stopwatch {
    last: Instant,
    seconds: Vec<(&'static str, f64)>,
}

impl Stopwatch {
    fn start() -> Self {
        Self { last: Instant::now(), seconds: Vec::new() }
    }

    fn lap(&mut self, stage: &'static str) {
        self.seconds.push((stage, self.last.elapsed().as_secs_f64()));
        self.last = Instant::now();
    }
}

/// Reads, samples, encodes and packs what `recipe.data` asks for.
///
/// # Errors
/// When a file cannot be read, a source has too few examples and the recipe says to fail, or the chat template
/// refuses all of a source.
pub fn prepare(recipe: &Recipe, files: &TokenizerFiles, model_vocab_size: Option<i64>) -> Result<Prepared> {
    let mut watch = Stopwatch::start();
    let spec = &recipe.data;
    let (tokenizer, collected) = rayon::join(|| ChatTokenizer::new(files, &spec.template), || collect(spec));
    let (tokenizer, mut collected) = (tokenizer?, collected?);
    watch.lap("read");
    let screened = screen(&mut collected, spec)?;
    watch.lap("screen");
    let quotas = quotas(&demands(&collected), spec.on_shortfall)?;
    let inputs =
        collected.iter().flat_map(|source| source.inputs.clone()).chain(screened.inputs.clone()).collect();
    let total = quotas.iter().sum::<usize>() as u64;
    let bar = progress::bar(total, "tokenise", "examples");
    let mut sampled = Vec::with_capacity(collected.len());
    let mut input = 0;
    for (index, (source, quota)) in collected.into_iter().zip(quotas).enumerate() {
        // The files of the records are the first that a source names.
        let (place, files) = ((u16::try_from(index)?, input), u32::try_from(source.inputs.len())?);
        sampled.push(sample(recipe, &tokenizer, place, source, quota, &screened, &bar)?);
        input += files;
    }
    bar.finish_and_clear();
    watch.lap("tokenise");
    let (sources, taken): (Vec<SourceReport>, Vec<Vec<Taken>>) =
        sampled.into_iter().map(|source| (source.report, source.taken)).unzip();
    let taken: Vec<Taken> = taken.into_iter().flatten().collect();
    if taken.is_empty() {
        return Err(anyhow!("no example is left: the dataset would be empty"));
    }
    let examples: Vec<Lineage> = taken.iter().map(|one| one.lineage.clone()).collect();
    let rows = packed(taken, spec.sequence_length, spec.seed)?;
    watch.lap("pack");
    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        program: concat!("granite ", env!("CARGO_PKG_VERSION")).to_string(),
        recipe: spec.clone(),
        model: recipe.model.base.clone(),
        model_vocab_size,
        tokenizer_vocab_size: tokenizer.vocab_size(),
        tokenizer_hash: tokenizer.hash().to_string(),
        sequence_length: spec.sequence_length,
        train: split_report(&rows, Split::Train, spec.sequence_length),
        validation: split_report(&rows, Split::Validation, spec.sequence_length),
        sources,
        inputs,
    };
    Ok(Prepared { manifest, rows, examples, findings: screened.findings, seconds: watch.seconds })
}

/// The first `count` examples that the recipe would take, in turn from each source, with the source's name.
///
/// # Errors
/// As [`prepare`].
pub fn preview(
    recipe: &Recipe,
    tokenizer: &ChatTokenizer,
    count: usize,
) -> Result<Vec<(String, Example, Fitted)>> {
    let spec = &recipe.data;
    let mut collected = collect(spec)?;
    screen(&mut collected, spec)?;
    let quotas = quotas(&demands(&collected), spec.on_shortfall)?;
    let orders: Vec<Vec<usize>> = collected
        .iter()
        .zip(&quotas)
        .map(|(source, quota)| {
            order(spec.seed, &source.name, &source.examples).into_iter().take(*quota).collect()
        })
        .collect();
    let longest = orders.iter().map(Vec::len).max().unwrap_or(0);
    let in_turn = (0..longest).flat_map(|at| {
        collected.iter().zip(&orders).filter_map(move |(source, order)| {
            let example = source.examples.get(*order.get(at)?)?;
            Some((source.name.as_str(), example))
        })
    });
    let mut shown = Vec::with_capacity(count);
    for (name, example) in in_turn {
        if shown.len() == count {
            break;
        }
        if let Some(fitted) = fit(tokenizer, example, spec.sequence_length)? {
            shown.push((name.to_string(), example.clone(), fitted));
        }
    }
    Ok(shown)
}

fn demands(collected: &[Collected]) -> Vec<Demand<'_>> {
    collected
        .iter()
        .map(|source| Demand { name: &source.name, asked: source.asked, available: source.examples.len() })
        .collect()
}

/// Takes `quota` examples of a source that fit; one that does not is replaced by the next in order.
fn sample(
    recipe: &Recipe,
    tokenizer: &ChatTokenizer,
    (index, input): (u16, u32),
    source: Collected,
    quota: usize,
    screened: &Screened,
    bar: &ProgressBar,
) -> Result<Sampled> {
    let spec = &recipe.data;
    let name = source.name.as_str();
    let mut waiting = order(spec.seed, name, &source.examples).into_iter();
    let mut dropped = source.dropped;
    let (mut taken, mut refusal) = (Vec::with_capacity(quota), None);
    loop {
        let batch: Vec<usize> = waiting.by_ref().take(quota - taken.len()).collect();
        if batch.is_empty() {
            break;
        }
        let outcomes: Vec<Result<Option<Taken>>> = batch
            .into_par_iter()
            .filter_map(|at| source.examples.get(at))
            .map(|example| {
                let fitted = fit(tokenizer, example, spec.sequence_length)?;
                bar.inc(1);
                let split = split_for(&screened.links, name, example, spec.validation_fraction);
                fitted.map(|fitted| take(example, fitted, (index, input), split)).transpose()
            })
            .collect();
        for outcome in outcomes {
            match outcome {
                Ok(Some(one)) if one.lineage.supervised_tokens == 0 => {
                    *dropped.entry(Reason::Unsupervised).or_default() += 1;
                }
                Ok(Some(mut one)) => {
                    one.responses = audited(&one, tokenizer)
                        .with_context(|| format!("source `{name}`, record {}", one.lineage.record))?;
                    taken.push(one);
                }
                Ok(None) => *dropped.entry(Reason::TooLong).or_default() += 1,
                Err(error) => {
                    *dropped.entry(Reason::Refused).or_default() += 1;
                    refusal.get_or_insert(error);
                }
            }
        }
    }
    let available = taken.len();
    match refusal {
        Some(error) if taken.is_empty() => return Err(error.context(format!("source `{name}`"))),
        Some(error) => progress::note(format!("warning: source `{name}`: {}", render(&error).trim_end())),
        None => {}
    }
    let is_short = source.asked.is_some() && available < quota;
    if is_short && spec.on_shortfall == OnShortfall::Fail {
        return Err(shortfall(&[&Demand { name, asked: source.asked, available }]));
    }
    // The order of the dump is the one that a reader can follow.
    taken.sort_by_key(|one| (one.lineage.input, one.lineage.record));
    let not_sampled = waiting.count() + source.passed_over;
    let mut report = report(name, &source.card, not_sampled, &dropped, &taken);
    (report.asked, report.read, report.skipped) = (source.asked, source.read, source.skipped);
    tell_findings(&mut report, source.cleaned, screened);
    Ok(Sampled { report, taken })
}

/// The split of an example's document, or of the one that its duplicates tie it to.
fn split_for(links: &Links, source: &str, example: &Example, fraction: f64) -> Split {
    let (source, document) = links.decider(source, &example.document);
    split_of(source, document, fraction)
}

/// The number of an example's responses, once each is seen to teach its end.
fn audited(one: &Taken, tokenizer: &ChatTokenizer) -> Result<usize> {
    let Sequence { input_ids, loss_mask, .. } = &one.sequence;
    audit::responses(input_ids, loss_mask, one.responses, tokenizer.eos_token_ids())
}

fn tell_findings(report: &mut SourceReport, cleaned: Cleaned, screened: &Screened) {
    let mut shown: BTreeMap<&str, usize> = BTreeMap::new();
    for finding in screened.findings.iter().filter(|finding| finding.source == report.name) {
        let shown = shown.entry(finding.reason.as_str()).or_default();
        *shown += 1;
        if *shown <= SHOWN {
            report.findings.push(finding.clone());
        }
    }
    let kept = screened.kept.get(report.name.as_str()).into_iter().flatten();
    report.kept = kept.map(|(reason, count)| ((*reason).to_string(), *count)).collect();
    report.cleaned = cleaned;
}

fn take(example: &Example, fitted: Fitted, (source, input): (u16, u32), split: Split) -> Result<Taken> {
    let supervised = fitted.encoded.loss_mask.iter().filter(|on| **on).count();
    let lineage = Lineage {
        source,
        record: example.record,
        document: example.document_id(),
        split,
        tokens: u32::try_from(fitted.encoded.ids.len())?,
        supervised_tokens: u32::try_from(supervised)?,
        shortened: fitted.shortened,
        input: input + example.file,
        turns: fitted.turns.clone(),
    };
    let Fitted { encoded, .. } = fitted;
    let sequence = Sequence { input_ids: encoded.ids, loss_mask: encoded.loss_mask, source };
    let responses = example.messages.iter().filter(|message| message.role == Role::Assistant).count();
    Ok(Taken { lineage, sequence, responses })
}

fn report(
    name: &str,
    card: &SourceCard,
    not_sampled: usize,
    dropped: &BTreeMap<Reason, usize>,
    taken: &[Taken],
) -> SourceReport {
    let counts = |split| {
        let mut counts = Counts::default();
        for one in taken.iter().filter(|one| one.lineage.split == split) {
            counts.add(one.lineage.tokens as usize, one.lineage.supervised_tokens as usize);
        }
        counts
    };
    let (train, validation) = (counts(Split::Train), counts(Split::Validation));
    let tokens = (train.tokens + validation.tokens).max(1);
    let mut audit = MaskAudit::default();
    taken.iter().for_each(|one| audit.add(one.responses));
    SourceReport {
        name: name.to_string(),
        licence: card.licence.clone(),
        commercial_use: card.commercial_use,
        not_sampled,
        taken: taken.len(),
        shortened: taken.iter().filter(|one| one.lineage.shortened).count(),
        dropped: dropped.iter().map(|(reason, count)| (reason.name().to_string(), *count)).collect(),
        supervised_share: (train.supervised_tokens + validation.supervised_tokens) as f64 / tokens as f64,
        audit,
        train,
        validation,
        ..SourceReport::default()
    }
}

/// Packs each split by itself; the examples' numbers are their places in `taken`.
fn packed(taken: Vec<Taken>, capacity: usize, seed: u64) -> Result<[(Split, Vec<PackedRow>); 2]> {
    let (splits, mut sequences): (Vec<Split>, Vec<Option<Sequence>>) =
        taken.into_iter().map(|one| (one.lineage.split, Some(one.sequence))).unzip();
    let mut pack_split = |split| -> Result<(Split, Vec<PackedRow>)> {
        let members: Vec<usize> = (0..splits.len()).filter(|at| splits.get(*at) == Some(&split)).collect();
        let length = |at: &usize| {
            sequences.get(*at).and_then(Option::as_ref).map_or(0, |sequence| sequence.input_ids.len())
        };
        let lengths: Vec<usize> = members.iter().map(length).collect();
        let mut rows = Vec::new();
        for places in pack(&lengths, capacity, seed) {
            let mut row = PackedRow::default();
            for example in places.into_iter().filter_map(|place| members.get(place)) {
                row.examples.push(u32::try_from(*example)?);
                row.sequences.extend(sequences.get_mut(*example).and_then(Option::take));
            }
            rows.push(row);
        }
        Ok((split, rows))
    };
    Ok([pack_split(Split::Train)?, pack_split(Split::Validation)?])
}

fn split_report(rows: &[(Split, Vec<PackedRow>); 2], split: Split, capacity: usize) -> SplitReport {
    let mut report = SplitReport::default();
    for row in rows.iter().filter(|(of, _)| *of == split).flat_map(|(_, rows)| rows) {
        report.rows += 1;
        for sequence in &row.sequences {
            let supervised = sequence.loss_mask.iter().filter(|on| **on).count();
            report.counts.add(sequence.input_ids.len(), supervised);
        }
    }
    if report.rows > 0 {
        report.packing_efficiency = report.counts.tokens as f64 / (report.rows * capacity) as f64;
    }
    report
}
