//! `granite merge`: base plus adapter as Hugging Face folders, each measured against base plus adapter before it appears.

mod page;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use tch::{Device, Kind};

use self::report::{FormReport, Limits, Measured, MergeReport, Model, REFERENCE};
use crate::checkpoint::adapter::{self, Adapter};
use crate::checkpoint::base::BaseModel;
use crate::checkpoint::form::Form;
use crate::checkpoint::merge::{self, MergeOptions, Merged};
use crate::checkpoint::nf4_cache;
use crate::checkpoint::open::{self, MERGED, ModelChoice, Place};
use crate::checkpoint::run::RunFolder;
use crate::cli::{MergeArgs, MergeBase, MergeDtype};
use crate::data::store::{Dataset, PackedRow, Split};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::user_error;
use crate::kernels::device;
use crate::kernels::gpu::Gpu;
use crate::losses::divergence::Reference;
use crate::model::decoder::Precision;
use crate::output::Staged;
use crate::progress::note;
use crate::recipe::{Quantization, Recipe};
use crate::stdout;

/// GPU memory that a comparison in f32 takes beside the weights: attention's scores and logits, some at a time.
const ROOM: i64 = 4 << 30;

/// A form that is written but not in its place yet.
struct Written {
    form: Form,
    staged: Staged,
    destination: PathBuf,
    merged: Merged,
}

/// What all forms are made of.
struct Merge<'a> {
    recipe: &'a Recipe,
    base: &'a BaseModel,
    adapter: &'a Adapter,
    from: Quantization,
    device: Device,
}

/// Runs the subcommand.
///
/// # Errors
/// When the adapter does not fit the base model, a file is missing, damaged or cannot be written, or a form is further
/// from base and adapter than a limit allows.
pub fn run(args: &MergeArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let limits = Limits { kl: args.max_kl, flips: args.max_flips };
    limits.check()?;
    let device = device::open(args.device)?;
    let run_folder = RunFolder::of(&recipe, None);
    let folder = match &args.adapter {
        Some(folder) => folder.clone(),
        None => open::newest_checkpoint(run_folder.path())?,
    };
    let destination = args.out.clone().unwrap_or_else(|| run_folder.path().join(MERGED));
    let adapter = adapter::load(&folder)?;
    let base = BaseModel::open(&recipe.model.base)?.with_nf4_cache(Path::new(nf4_cache::DEFAULT_FOLDER));
    if let Some(difference) =
        open::other_base(&folder, &base, recipe.model.quantization).filter(|_| !args.any_base)
    {
        return Err(user_error(
            difference,
            "merge with the base model and the quantization of the run's recipe, or accept these with `--any-base`",
        ));
    }
    let rows = held_out(&recipe, &base, args.rows)?;
    ensure_measurable(&limits, rows.is_some())?;
    let from = starting_point(&recipe, args.base);
    let merge = Merge { recipe: &recipe, base: &base, adapter: &adapter, from, device };
    let written = merge.write_all(&forms(&args.dtype), &destination)?;
    let measured = rows.map(|rows| merge.measure(&written, &rows)).transpose()?.flatten();
    ensure_measurable(&limits, measured.is_some())?;
    let report = merge.report(&written, measured, limits);
    finish(&report, written, &destination)?;
    if args.json {
        stdout::text(&report.json()?)?;
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

/// Each once, in the order they were named.
fn forms(dtypes: &[MergeDtype]) -> Vec<Form> {
    let mut forms = Vec::new();
    for dtype in dtypes {
        let form = match dtype {
            MergeDtype::Fp32 => Form::Fp32,
            MergeDtype::Bf16 => Form::Bf16,
            MergeDtype::Fp16 => Form::Fp16,
            MergeDtype::Nf4 => Form::Nf4,
        };
        if !forms.contains(&form) {
            forms.push(form);
        }
    }
    forms
}

/// The first form has the destination itself, others lie beside it: `merged-nf4`.
fn place(destination: &Path, index: usize, form: Form) -> PathBuf {
    if index == 0 { destination.to_path_buf() } else { beside(destination, form.name()) }
}

fn beside(destination: &Path, what: &str) -> PathBuf {
    let mut name = destination.file_name().unwrap_or_default().to_os_string();
    name.push(format!("-{what}"));
    destination.with_file_name(name)
}

/// A limit that nothing can be held against is no limit.
fn ensure_measurable(limits: &Limits, measurable: bool) -> Result<()> {
    if measurable || !limits.any() {
        return Ok(());
    }
    Err(user_error(
        "`--max-kl` and `--max-flips` need held-out rows, and there is none with a supervised token",
        "run `granite prepare` with this recipe and `data.validation_fraction` above 0, and leave `--rows` above 0",
    ))
}

impl Merge<'_> {
    fn write_all(&self, forms: &[Form], destination: &Path) -> Result<Vec<Written>> {
        let write = |(index, form): (usize, &Form)| {
            let destination = place(destination, index, *form);
            let staged = Staged::folder(&destination, &[report::JSON])?;
            let options = MergeOptions { from: self.from, form: *form, device: self.device };
            let merged = merge::write(staged.path(), self.base, self.adapter, &options)
                .with_context(|| format!("cannot merge to {}", form.name()))?;
            Ok(Written { form: *form, staged, destination, merged })
        };
        forms.iter().enumerate().map(write).collect()
    }

    /// Measures base and adapter as they were trained, then each form as it lies on disk, one in memory at a time.
    fn measure(&self, written: &[Written], rows: &[PackedRow]) -> Result<Option<Measured>> {
        let choice = ModelChoice::Adapter(Some(self.adapter.folder.clone()));
        let place = Place { device: self.device, precision: self.precision()? };
        let mut decoder = open::open_in(self.recipe, &choice, Path::new(""), place)?.decoder;
        let computed_in = if decoder.kind() == Kind::Float { "f32" } else { "bf16" };
        let reference = Reference::take(&decoder, rows)?;
        let adapted = reference.compare(&decoder, rows)?;
        decoder.enable_adapters(false);
        let plain = reference.compare(&decoder, rows)?;
        // The next model takes its place in memory.
        drop(decoder);
        let (Some(plain), Some(adapted)) = (plain, adapted) else { return Ok(None) };
        let seed = self.recipe.eval.seed;
        let mut models = vec![Model::new("base", plain, seed), Model::new(REFERENCE, adapted, seed)];
        for Written { form, staged, .. } in written {
            let choice = ModelChoice::Folder(staged.path().to_path_buf());
            let decoder = open::open_in(self.recipe, &choice, Path::new(""), place)
                .with_context(|| format!("the model merged to {} cannot be opened again", form.name()))?
                .decoder;
            models
                .extend(reference.compare(&decoder, rows)?.map(|found| Model::new(form.name(), found, seed)));
        }
        Ok(Some(Measured { rows: rows.len(), computed_in, models }))
    }

    /// In f32 wherever a whole model fits in it: in bf16 what is stored in f32 would be rounded before it is compared.
    fn precision(&self) -> Result<Precision> {
        let Device::Cuda(index) = self.device else { return Ok(Precision::Native) };
        let needed = self.base.config.parameters().saturating_mul(4).saturating_add(ROOM);
        let free = i64::try_from(Gpu::at(index)?.memory()?.0).unwrap_or(i64::MAX);
        Ok(if needed <= free { Precision::Full } else { Precision::Native })
    }

    fn report(&self, written: &[Written], measured: Option<Measured>, limits: Limits) -> MergeReport {
        let form = |written: &Written| FormReport {
            form: written.form,
            folder: written.destination.clone(),
            bytes: written.merged.bytes,
            updates: written.merged.updates.clone(),
            matrices: written.merged.steps.clone(),
        };
        let beyond = measured.iter().flat_map(|measured| limits.beyond(&measured.models)).collect();
        MergeReport {
            format_version: report::FORMAT_VERSION,
            program: concat!("granite ", env!("CARGO_PKG_VERSION")).to_string(),
            recipe: self.recipe.name.clone(),
            base: self.recipe.model.base.clone(),
            base_hash: self.base.hash.clone(),
            adapter: self.adapter.folder.clone(),
            rank: self.adapter.spec.rank,
            scale: self.adapter.spec.scale(),
            merged_onto: match self.from {
                Quantization::Nf4 => "dequantized",
                Quantization::None => "original",
            },
            forms: written.iter().map(form).collect(),
            measured,
            limits,
            beyond,
        }
    }
}

/// Puts all forms in their places, or none and the report beside them.
fn finish(report: &MergeReport, written: Vec<Written>, destination: &Path) -> Result<()> {
    report.tell();
    if !report.beyond.is_empty() {
        // Dropped, so that nothing stays of them.
        drop(written);
        let refused = beside(destination, "refused");
        let staged = Staged::folder(&refused, &[report::JSON])?;
        report.write(staged.path())?;
        staged.commit()?;
        return Err(user_error(
            format!("nothing is merged: {}", report.beyond.join("; ")),
            format!("see `{}`", refused.join(report::PAGE).display()),
        ));
    }
    for Written { staged, .. } in &written {
        report.write(staged.path())?;
    }
    for Written { form, staged, destination, .. } in written {
        staged.commit()?;
        note(format!("merged {} into {} ({})", report.adapter.display(), destination.display(), form.name()));
    }
    Ok(())
}

/// Some held-out rows; without a dataset of this model the merge goes on unmeasured.
fn held_out(recipe: &Recipe, base: &BaseModel, count: usize) -> Result<Option<Vec<PackedRow>>> {
    if count == 0 {
        return Ok(None);
    }
    let tokenizer = ChatTokenizer::new(&base.tokenizer, &recipe.data.template)?;
    let opened = Dataset::open(&recipe.data.dataset)
        .and_then(|dataset| dataset.check_tokenizer(&tokenizer).map(|()| dataset));
    let dataset = match opened {
        Ok(dataset) => dataset,
        Err(error) => {
            note(format!("note: nothing is measured in the merge report: {}", error.root_cause()));
            return Ok(None);
        }
    };
    let mut rows = dataset.rows(Split::Validation)?;
    rows.truncate(count);
    if rows.is_empty() {
        note("note: nothing is measured in the merge report: the dataset holds no row out");
        return Ok(None);
    }
    Ok(Some(rows))
}

impl Limits {
    fn check(&self) -> Result<()> {
        for (name, value) in [("--max-kl", self.kl), ("--max-flips", self.flips)] {
            let usable = value.is_none_or(|value| value.is_finite() && value >= 0.0);
            ensure!(usable, "`{name}` is {}, expected a number from 0", value.unwrap_or_default());
        }
        Ok(())
    }
}
