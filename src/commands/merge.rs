//! `granite merge`: base plus adapter as one Hugging Face folder, with the losses of all three side by side.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;
use tch::{Device, Kind};

use crate::checkpoint::adapter::{self, Adapter};
use crate::checkpoint::base::BaseModel;
use crate::checkpoint::merge::{self, MergeOptions, Merged, UpdateSize};
use crate::checkpoint::nf4_cache;
use crate::checkpoint::open::{self, MERGED, ModelChoice, OpenModel};
use crate::checkpoint::run::RunFolder;
use crate::cli::{MergeArgs, MergeBase};
use crate::data::store::{Dataset, PackedRow, Split};
use crate::data::tokenizer::ChatTokenizer;
use crate::kernels::device;
use crate::losses::{self, LossOf};
use crate::output::Staged;
use crate::progress::note;
use crate::recipe::{Quantization, Recipe};

/// Held-out rows that base, adapter and merged model are compared on: some thousand tokens tell a broken
/// merge from a good one; the whole split is `granite eval`'s.
const COMPARED_ROWS: usize = 4;

const REPORT: &str = "merge_report.json";

/// What was merged and what came of it: `merge_report.json`.
#[derive(Debug, Serialize)]
struct MergeReport {
    format_version: u32,
    program: String,
    recipe: String,
    base: String,
    base_hash: String,
    adapter: PathBuf,
    rank: usize,
    scale: f64,
    /// `dequantized` or `original`.
    merged_onto: &'static str,
    dtype: &'static str,
    bytes: u64,
    /// Absent where the dataset is not there or is another model's.
    losses: Option<Losses>,
    updates: Vec<UpdateSize>,
}

/// Mean loss of a supervised token in nats, of the same held-out rows.
#[derive(Debug, Serialize)]
struct Losses {
    rows: usize,
    tokens: i64,
    base: f64,
    adapter: f64,
    merged: f64,
}

/// Runs the subcommand.
///
/// # Errors
/// When the adapter does not fit the base model, or a file is missing, damaged or cannot be written.
pub fn run(args: &MergeArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let device = device::open(args.device)?;
    let run_folder = RunFolder::of(&recipe, None);
    let folder = match &args.adapter {
        Some(folder) => folder.clone(),
        None => open::newest_checkpoint(run_folder.path())?,
    };
    let destination = args.out.clone().unwrap_or_else(|| run_folder.path().join(MERGED));
    let adapter = adapter::load(&folder)?;
    let base = BaseModel::open(&recipe.model.base)?.with_nf4_cache(Path::new(nf4_cache::DEFAULT_FOLDER));
    let staged = Staged::folder(&destination)?;
    let options = MergeOptions { from: starting_point(&recipe, args.base), dtype: Kind::BFloat16, device };
    let merged = merge::write(staged.path(), &base, &adapter, &options)?;
    let losses = compare(&recipe, &base, &folder, staged.path(), device)?;
    let report = report(&recipe, &base, &adapter, &options, merged, losses);
    let mut text = serde_json::to_string_pretty(&report)?;
    text.push('\n');
    let path = staged.path().join(REPORT);
    std::fs::write(&path, &text).with_context(|| format!("cannot write `{}`", path.display()))?;
    staged.commit()?;
    tell(&report, &destination);
    if args.json {
        std::io::stdout().write_all(text.as_bytes()).context("cannot write to stdout")?;
    }
    Ok(())
}

/// Weights that were never quantised are their own dequantised form.
fn starting_point(recipe: &Recipe, base: MergeBase) -> Quantization {
    match base {
        MergeBase::Dequantized => recipe.model.quantization,
        MergeBase::Original => Quantization::None,
    }
}

/// Measures base and adapter as they were trained, then the merged model as it lies on disk.
fn compare(
    recipe: &Recipe,
    base: &BaseModel,
    adapter: &Path,
    merged: &Path,
    device: Device,
) -> Result<Option<Losses>> {
    let Some((rows, names)) = held_out(recipe, base)? else { return Ok(None) };
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let choice = ModelChoice::Adapter(Some(adapter.to_path_buf()));
    let OpenModel { mut decoder, .. } = open::open(recipe, &choice, Path::new(""), device)?;
    let adapted = losses::measure(&decoder, &rows, &names)?;
    decoder.enable_adapters(false);
    let plain = losses::measure(&decoder, &rows, &names)?;
    // The next model takes its place in memory.
    drop(decoder);
    let stored = ModelChoice::Folder(merged.to_path_buf());
    let OpenModel { decoder, .. } = open::open(recipe, &stored, Path::new(""), device)
        .context("the merged model cannot be opened again")?;
    let stored = losses::measure(&decoder, &rows, &names)?;
    let (Some(plain), Some(adapted), Some(stored)) = (plain, adapted, stored) else { return Ok(None) };
    let LossOf { loss: merged, tokens, .. } = stored.overall;
    let (base, adapter) = (plain.overall.loss, adapted.overall.loss);
    Ok(Some(Losses { rows: rows.len(), tokens, base, adapter, merged }))
}

/// Some held-out rows and the names of the sources; without a dataset of this model the merge goes on unmeasured.
fn held_out(recipe: &Recipe, base: &BaseModel) -> Result<Option<(Vec<PackedRow>, Vec<String>)>> {
    let tokenizer = ChatTokenizer::new(&base.tokenizer, &recipe.data.template)?;
    let opened = Dataset::open(&recipe.data.dataset)
        .and_then(|dataset| dataset.check_tokenizer(&tokenizer).map(|()| dataset));
    let dataset = match opened {
        Ok(dataset) => dataset,
        Err(error) => {
            note(format!("note: no losses in the merge report: {}", error.root_cause()));
            return Ok(None);
        }
    };
    let mut rows = dataset.rows(Split::Validation)?;
    rows.truncate(COMPARED_ROWS);
    if rows.is_empty() {
        note("note: no losses in the merge report: the dataset holds no row out");
        return Ok(None);
    }
    Ok(Some((rows, dataset.source_names().into_iter().map(str::to_string).collect())))
}

fn report(
    recipe: &Recipe,
    base: &BaseModel,
    adapter: &Adapter,
    options: &MergeOptions,
    merged: Merged,
    losses: Option<Losses>,
) -> MergeReport {
    MergeReport {
        format_version: 1,
        program: concat!("granite ", env!("CARGO_PKG_VERSION")).to_string(),
        recipe: recipe.name.clone(),
        base: recipe.model.base.clone(),
        base_hash: base.hash.clone(),
        adapter: adapter.folder.clone(),
        rank: adapter.spec.rank,
        scale: adapter.spec.scale(),
        merged_onto: match options.from {
            Quantization::Nf4 => "dequantized",
            Quantization::None => "original",
        },
        dtype: "bfloat16",
        bytes: merged.bytes,
        losses,
        updates: merged.updates,
    }
}

fn tell(report: &MergeReport, destination: &Path) {
    note(format!("merged {} into {}", report.adapter.display(), destination.display()));
    for UpdateSize { projection, mean, max, layer_of_max, rounding } in &report.updates {
        note(format!(
            "  {projection:<10} moved by {mean:.2e} of its size (most in layer {layer_of_max}: {max:.2e}), rounding {rounding:.2e}"
        ));
    }
    if let Some(Losses { rows, tokens, base, adapter, merged }) = &report.losses {
        note(format!(
            "  loss on {rows} held-out rows, {tokens} tokens: base {base:.4}, adapter {adapter:.4}, merged {merged:.4}"
        ));
    }
}
