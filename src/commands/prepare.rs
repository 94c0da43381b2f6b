//! `granite prepare`

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::checkpoint::base::open_tokenizer;
use crate::cli::{PrepareArgs, SplitChoice, TokenPlace};
use crate::data::manifest::{Manifest, SourceReport, SplitReport};
use crate::data::prepare::{Prepared, prepare, preview};
use crate::data::report::page;
use crate::data::screen::Finding;
use crate::data::store::{self, Dataset, Split};
use crate::data::tokenizer::{ChatTokenizer, Encoded, TokenizerFiles};
use crate::data::trace::trace;
use crate::output::{Staged, ensure_replaceable};
use crate::progress::note;
use crate::recipe::Recipe;
use crate::stdout;

/// Runs the subcommand.
///
/// # Errors
/// What went wrong.
pub fn run(args: &PrepareArgs) -> Result<()> {
    let start = Instant::now();
    let mut recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    recipe.data.duplicates.keep |= args.keep_duplicates;
    recipe.data.contamination.keep |= args.keep_contaminated;
    recipe.data.skip_bad = args.skip_bad.unwrap_or(recipe.data.skip_bad);
    let (files, config) = open_tokenizer(&recipe.model.base)?;
    if let Some(count) = args.show {
        return show(&recipe, &files, count);
    }
    if let Some(place) = args.trace {
        return tell_trace(args, &recipe, &files, place);
    }
    let folder = args.out.as_deref().unwrap_or(&recipe.data.dataset);
    // Before the work, and once more when it is written.
    ensure_replaceable(folder, &[store::MANIFEST])?;
    let mut prepared = prepare(&recipe, &files, config.map(|config| config.vocab_size))?;
    let writing = Instant::now();
    write(folder, &prepared)?;
    prepared.seconds.push(("write", writing.elapsed().as_secs_f64()));
    let total = start.elapsed().as_secs_f64();
    tell(folder, &prepared.manifest, total);
    let timings = if args.timings { Some(timings(&recipe, &files, folder, &prepared, total)?) } else { None };
    if args.json {
        print_json(folder, &prepared.manifest, timings)?;
    }
    Ok(())
}

/// Answers from the dataset's folder alone; the dumps need not be there any more.
fn tell_trace(args: &PrepareArgs, recipe: &Recipe, files: &TokenizerFiles, place: TokenPlace) -> Result<()> {
    let dataset = Dataset::open(args.out.as_deref().unwrap_or(&recipe.data.dataset))?;
    let tokenizer = ChatTokenizer::new(files, &recipe.data.template)?;
    let split = match args.split {
        SplitChoice::Train => Split::Train,
        SplitChoice::Validation => Split::Validation,
    };
    let found = trace(&dataset, &tokenizer, split, place.row, place.token)?;
    if args.json { stdout::json(&found) } else { stdout::text(&found.told()) }
}

fn write(folder: &Path, prepared: &Prepared) -> Result<()> {
    let staged = Staged::folder(folder, &[store::MANIFEST])?;
    let [(train, train_rows), (validation, validation_rows)] = &prepared.rows;
    let splits = [(*train, train_rows.as_slice()), (*validation, validation_rows.as_slice())];
    store::write(staged.path(), &prepared.manifest, splits, &prepared.examples)?;
    let page = page(&prepared.manifest, &prepared.findings, &prepared.examples);
    for (name, contents) in
        [(store::SCREENED, lines(&prepared.findings)?), (store::REPORT, page.into_bytes())]
    {
        let path = staged.path().join(name);
        std::fs::write(&path, contents).with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    staged.commit()
}

/// One JSON object a line.
fn lines(findings: &[Finding]) -> Result<Vec<u8>> {
    let mut lines = Vec::new();
    for finding in findings {
        serde_json::to_writer(&mut lines, finding)?;
        lines.push(b'\n');
    }
    Ok(lines)
}

fn print_json(folder: &Path, manifest: &Manifest, timings: Option<serde_json::Value>) -> Result<()> {
    let mut summary = json!({ "dataset": folder.display().to_string(), "manifest": manifest });
    if let Some(timings) = timings {
        summary["timings"] = timings;
    }
    stdout::json(&summary)
}

/// Prints examples with what is supervised between `⟦` and `⟧`, as the tokens have it.
fn show(recipe: &Recipe, files: &TokenizerFiles, count: usize) -> Result<()> {
    let tokenizer = ChatTokenizer::new(files, &recipe.data.template)?;
    for (source, example, fitted) in preview(recipe, &tokenizer, count)? {
        let supervised = fitted.encoded.loss_mask.iter().filter(|on| **on).count();
        stdout::text(&format!(
            "=== {source}, record {}: {} tokens, {supervised} supervised{}\n{}\n",
            example.record,
            fitted.encoded.ids.len(),
            if fitted.shortened { ", context shortened" } else { "" },
            marked(&tokenizer, &fitted.encoded)?,
        ))?;
    }
    Ok(())
}

fn marked(tokenizer: &ChatTokenizer, encoded: &Encoded) -> Result<String> {
    let mut text = String::new();
    let mut at = 0;
    for run in encoded.loss_mask.chunk_by(|a, b| a == b) {
        let piece = tokenizer.decode(encoded.ids.get(at..at + run.len()).unwrap_or_default(), false)?;
        at += run.len();
        let (open, close) = if run.first() == Some(&true) { ("⟦", "⟧") } else { ("", "") };
        // Writing into a String cannot fail.
        let _ = write!(text, "{open}{piece}{close}");
    }
    Ok(text)
}

fn tell(folder: &Path, manifest: &Manifest, seconds: f64) {
    note(format!(
        "{:<15} {:>8} {:>8} {:>9} {:>8} {:>10} {:>11} {:>6}  left out",
        "source", "read", "taken", "shortened", "held out", "tokens", "supervised", "share"
    ));
    let all = (manifest.train.counts.tokens + manifest.validation.counts.tokens).max(1);
    for source in &manifest.sources {
        note(source_line(source, all));
    }
    for (name, split) in [("train", &manifest.train), ("validation", &manifest.validation)] {
        note(split_line(name, split, manifest.sequence_length));
    }
    for (source, one) in
        manifest.sources.iter().flat_map(|source| source.skipped.iter().map(move |one| (source, one)))
    {
        note(format!(
            "skipped: source `{}`, `{}`, record {}: {}",
            source.name, one.file, one.record, one.reason
        ));
    }
    for source in manifest.sources.iter().filter(|source| !source.commercial_use) {
        note(format!(
            "warning: source `{}` is licensed {}: a model trained on it is not for commercial use",
            source.name, source.licence
        ));
    }
    note(format!("wrote `{}` in {seconds:.1} s", folder.display()));
}

fn source_line(source: &SourceReport, all: u64) -> String {
    let tokens = source.train.tokens + source.validation.tokens;
    let mut left_out: Vec<String> = source
        .dropped
        .iter()
        .map(|(reason, count)| format!("{count} {}", reason.replace('_', " ")))
        .collect();
    left_out.extend(
        source.kept.iter().map(|(reason, count)| format!("{count} {} kept", reason.replace('_', " "))),
    );
    if source.cleaned.examples > 0 {
        left_out.push(format!("{} cleaned", source.cleaned.examples));
    }
    if source.not_sampled > 0 {
        left_out.push(format!("{} not sampled", source.not_sampled));
    }
    format!(
        "{:<15} {:>8} {:>8} {:>9} {:>8} {:>10} {:>11} {:>5.1}%  {}",
        source.name,
        source.read,
        source.taken,
        source.shortened,
        source.validation.examples,
        tokens,
        source.train.supervised_tokens + source.validation.supervised_tokens,
        100.0 * tokens as f64 / all as f64,
        left_out.join(", "),
    )
}

fn split_line(name: &str, split: &SplitReport, sequence_length: usize) -> String {
    format!(
        "{name}: {} rows of {sequence_length} tokens hold {} examples, {} tokens ({} supervised), {:.2} % full",
        split.rows,
        split.counts.examples,
        split.counts.tokens,
        split.counts.supervised_tokens,
        100.0 * split.packing_efficiency,
    )
}

/// Encodes the dataset's own texts with the tokenizers library and nothing else, and sets the times side by side.
fn timings(
    recipe: &Recipe,
    files: &TokenizerFiles,
    folder: &Path,
    prepared: &Prepared,
    total: f64,
) -> Result<serde_json::Value> {
    // A tokenizer of its own, so that nothing is in its cache.
    let tokenizer = ChatTokenizer::new(files, &recipe.data.template)?;
    let sequences = prepared.rows.iter().flat_map(|(_, rows)| rows).flat_map(|row| &row.sequences);
    let texts: Vec<String> =
        sequences.map(|sequence| tokenizer.decode(&sequence.input_ids, false)).collect::<Result<_>>()?;
    let tokenizer = ChatTokenizer::new(files, &recipe.data.template)?;
    let start = Instant::now();
    let encoded = tokenizer.encode_batch(texts)?;
    let bare = start.elapsed().as_secs_f64();
    drop(encoded);
    for (stage, seconds) in &prepared.seconds {
        note(format!("{stage:<12} {seconds:>7.2} s"));
    }
    let ratio = total / bare;
    note(format!(
        "total        {total:>7.2} s: {ratio:.2} times a bare encode_batch of the same texts ({bare:.2} s)"
    ));
    let stages: serde_json::Map<String, serde_json::Value> =
        prepared.seconds.iter().map(|(stage, seconds)| ((*stage).to_string(), json!(seconds))).collect();
    Ok(
        json!({ "dataset": folder.display().to_string(), "stages": stages, "total": total, "bare_encode_batch": bare, "ratio": ratio }),
    )
}
