//! `granite eval`: losses per source, task scores, models side by side, a report.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;
use tch::Device;

use crate::checkpoint::adapter;
use crate::checkpoint::base::open_tokenizer;
use crate::checkpoint::open::{self, ModelChoice, OpenModel};
use crate::checkpoint::run::RunFolder;
use crate::cli::EvalArgs;
use crate::data::reader::fingerprint;
use crate::data::store::{Dataset, PackedRow, Split};
use crate::data::tokenizer::ChatTokenizer;
use crate::engine::{Engine, EngineHandle, EngineOptions};
use crate::error::user_error;
use crate::eval::asking::{self, Speaker};
use crate::eval::comparison::{self, Measured, TaskResults};
use crate::eval::identity::Identity;
use crate::eval::report::{self, FORMAT_VERSION, ModelReport, Report, Shown};
use crate::eval::results::Results;
use crate::eval::row_losses::{self, RowLosses};
use crate::eval::sandbox::{Limits, Sandbox};
use crate::eval::statistics::{CONFIDENCE, Interval, RESAMPLES};
use crate::eval::task::{Answered, Task};
use crate::eval::tasks::code::Code;
use crate::eval::tasks::finance::Finance;
use crate::eval::tasks::gsm8k::Gsm8k;
use crate::eval::tasks::held_out::HeldOut;
use crate::eval::tasks::spider::Spider;
use crate::kernels::device;
use crate::model::decoder::Decoder;
use crate::progress::note;
use crate::recipe::{EvalSpec, Recipe};

const PROGRAM: &str = concat!("granite ", env!("CARGO_PKG_VERSION"));
const LOSSES: &str = "losses.jsonl";
/// Hex digits of a hash that are shown.
const SHORT: usize = 12;

/// Runs the subcommand.
///
/// # Errors
/// When a model, the dataset or a task's files are missing or damaged, the folder holds results of something else,
/// or a file cannot be written.
pub fn run(args: &EvalArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let device = device::open(args.device)?;
    let run_folder = RunFolder::of(&recipe, None);
    let models = models_of(&args.model, run_folder.path())?;
    let out = args.out.clone().unwrap_or_else(|| destination(&models, run_folder.path()));

    let dataset = Dataset::open(&recipe.data.dataset)?;
    let rows = dataset.rows(Split::Validation)?;
    if rows.is_empty() {
        note("note: the dataset holds no row out: set `data.validation_fraction` to measure losses");
    }
    let mut identity = Identity::open(&out)?;
    if !identity.is_new() {
        note(format!("going on with what is in {}", out.display()));
    }
    identity.claim(&choices(args, &recipe, &models)?)?;
    let mut evaluation = Evaluation {
        recipe: &recipe,
        run_folder: run_folder.path(),
        device,
        tasks: Vec::new(),
        dataset,
        rows,
    };
    evaluation.tasks = evaluation.open_tasks(args.limit)?;

    let (mut measured, mut reports) = (Vec::new(), Vec::new());
    for model in &models {
        let (results, report) = evaluation.measure(model, &out, &mut identity)?;
        tell(&report);
        measured.push(results);
        reports.push(report);
    }
    let report = evaluation.report(&measured, reports);
    report::write(&out, &report, &shown(&measured))?;
    note(format!("report in {}", out.display()));
    if args.json {
        let mut stdout = std::io::stdout().lock();
        serde_json::to_writer_pretty(&mut stdout, &report)?;
        writeln!(stdout).context("cannot write to stdout")?;
    }
    Ok(())
}

/// A model that was asked for.
#[derive(Debug)]
struct Named {
    /// Its name in reports, and of the folder of its results.
    name: String,
    choice: ModelChoice,
}

/// The models by name; `adapter` is pinned to the newest checkpoint of this moment.
fn models_of(asked: &[String], run_folder: &Path) -> Result<Vec<Named>> {
    let mut models: Vec<Named> = Vec::new();
    for text in asked {
        let choice: ModelChoice = text.parse().unwrap_or_else(|never| match never {});
        let choice = match choice {
            ModelChoice::Adapter(None) => ModelChoice::Adapter(Some(open::newest_checkpoint(run_folder)?)),
            other => other,
        };
        let name = match &choice {
            ModelChoice::Folder(folder) => folder
                .file_name()
                .map_or_else(|| "folder".to_string(), |name| name.to_string_lossy().into_owned()),
            _ => text.clone(),
        };
        if models.iter().any(|model| model.name == name) {
            return Err(user_error(
                format!("two models are called `{name}`"),
                "name each model once; folders are called by their last part",
            ));
        }
        models.push(Named { name, choice });
    }
    Ok(models)
}

/// `eval-<models>` in the run's folder.
fn destination(models: &[Named], run_folder: &Path) -> PathBuf {
    let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    run_folder.join(format!("eval-{}", names.join("-")))
}

/// What decides the numbers, whatever the model.
fn choices(args: &EvalArgs, recipe: &Recipe, models: &[Named]) -> Result<Vec<(String, String)>> {
    let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    let rows = hash_of(&recipe.data.dataset.join("validation.parquet"))?;
    let mut choices = vec![
        ("program".to_string(), PROGRAM.to_string()),
        ("list of models".to_string(), names.join(", ")),
        ("dataset".to_string(), format!("{} (SHA-256 {rows})", recipe.data.dataset.display())),
        ("limit".to_string(), args.limit.map_or("none".to_string(), |limit| limit.to_string())),
        ("template".to_string(), serde_json::to_string(&recipe.data.template)?),
    ];
    let EvalSpec { seed: _, held_out, spider, convfinqa, finqa, gsm8k, humaneval, mbpp } = &recipe.eval;
    if let Some(spec) = held_out {
        choices.push(("eval.held_out".to_string(), serde_json::to_string(spec)?));
    }
    let mut add = |name: &str, path: Option<&Path>, spec: String| -> Result<()> {
        if let Some(path) = path {
            choices.push((format!("eval.{name}"), format!("{spec} (SHA-256 {})", hash_of(path)?)));
        }
        Ok(())
    };
    add("spider", spider.as_ref().map(|spec| spec.path.as_path()), json(spider)?)?;
    add("convfinqa", convfinqa.as_ref().map(|spec| spec.path.as_path()), json(convfinqa)?)?;
    add("finqa", finqa.as_ref().map(|spec| spec.path.as_path()), json(finqa)?)?;
    for (name, spec) in [("gsm8k", gsm8k), ("humaneval", humaneval), ("mbpp", mbpp)] {
        add(name, spec.as_ref().map(|spec| spec.path.as_path()), json(spec)?)?;
    }
    Ok(choices)
}

fn json(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string(value)?)
}

fn hash_of(path: &Path) -> Result<String> {
    Ok(short(&fingerprint(path)?.sha256).to_string())
}

fn short(hash: &str) -> &str {
    hash.get(..SHORT).unwrap_or(hash)
}

/// What is the same for all models.
struct Evaluation<'a> {
    recipe: &'a Recipe,
    run_folder: &'a Path,
    device: Device,
    dataset: Dataset,
    rows: Vec<PackedRow>,
    tasks: Vec<Box<dyn Task>>,
}

impl Evaluation<'_> {
    /// All tasks of the recipe, before any model is read: a wrong path is told at once.
    fn open_tasks(&self, limit: Option<usize>) -> Result<Vec<Box<dyn Task>>> {
        let EvalSpec { seed: _, held_out, spider, convfinqa, finqa, gsm8k, humaneval, mbpp } =
            &self.recipe.eval;
        let mut tasks: Vec<Box<dyn Task>> = Vec::new();
        if let Some(spec) = held_out {
            let (files, _) = open_tokenizer(&self.recipe.model.base)?;
            let tokenizer = ChatTokenizer::new(&files, &self.recipe.data.template)?;
            self.dataset.check_tokenizer(&tokenizer)?;
            tasks.push(Box::new(HeldOut::open(spec, limit, &self.dataset, &tokenizer)?));
        }
        if let Some(spec) = spider {
            tasks.push(Box::new(Spider::open(spec, limit)?));
        }
        if let Some(spec) = convfinqa {
            tasks.push(Box::new(Finance::conversations(spec, limit)?));
        }
        if let Some(spec) = finqa {
            tasks.push(Box::new(Finance::questions(spec, limit)?));
        }
        if let Some(spec) = gsm8k {
            tasks.push(Box::new(Gsm8k::open(spec, limit)?));
        }
        if humaneval.is_some() || mbpp.is_some() {
            let sandbox = Rc::new(sandbox()?);
            if let Some(spec) = humaneval {
                tasks.push(Box::new(Code::human_eval(spec, limit, Rc::clone(&sandbox))?));
            }
            if let Some(spec) = mbpp {
                tasks.push(Box::new(Code::mbpp(spec, limit, sandbox)?));
            }
        }
        Ok(tasks)
    }

    /// Measures a model, or what of it is not measured yet.
    fn measure(
        &mut self,
        model: &Named,
        out: &Path,
        identity: &mut Identity,
    ) -> Result<(Measured, ModelReport)> {
        let Named { name, choice } = model;
        let OpenModel { decoder, base, label } =
            open::open(self.recipe, choice, self.run_folder, self.device)?;
        let tokenizer = ChatTokenizer::new(&base.tokenizer, &self.recipe.data.template)?;
        self.dataset.check_tokenizer(&tokenizer)?;
        identity
            .claim(&[(format!("model `{name}`"), content_of(choice, &label, &base.hash, &tokenizer)?)])?;
        let folder = out.join(name);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create folder `{}`", folder.display()))?;

        let mut losses = Results::<RowLosses>::open(&folder.join(LOSSES))?;
        row_losses::measure(&decoder, &self.rows, &mut losses)?;
        let tasks = self.ask(decoder, &tokenizer, &folder)?;
        let measured = Measured { name: name.clone(), losses: losses.all().to_vec(), tasks };
        let seed = self.recipe.eval.seed;
        let report = ModelReport {
            name: name.clone(),
            label,
            path: base.path.display().to_string(),
            base_hash: base.hash.clone(),
            results: name.clone(),
            losses: comparison::losses(&measured.losses, &self.dataset.source_names(), seed),
            tasks: measured.tasks.iter().map(|task| comparison::task(task, seed)).collect(),
        };
        Ok((measured, report))
    }

    fn ask(
        &mut self,
        decoder: Decoder,
        tokenizer: &ChatTokenizer,
        folder: &Path,
    ) -> Result<Vec<TaskResults>> {
        if self.tasks.is_empty() {
            return Ok(Vec::new());
        }
        let speaker = Speaker {
            encode: &|messages| tokenizer.encode_prompt(messages),
            decode: &|ids| tokenizer.decode(ids, true),
            stop_token_ids: tokenizer.eos_token_ids().to_vec(),
        };
        let engine = Engine::spawn(decoder, &EngineOptions { queue: asking::UNDER_WAY, context: None })?;
        self.tasks.iter_mut().map(|task| ask_one(task.as_mut(), &engine, &speaker, folder)).collect()
    }

    fn report(&self, measured: &[Measured], models: Vec<ModelReport>) -> Report {
        let seed = self.recipe.eval.seed;
        Report {
            format_version: FORMAT_VERSION,
            program: PROGRAM.to_string(),
            recipe: self.recipe.name.clone(),
            dataset: self.recipe.data.dataset.display().to_string(),
            seed,
            resamples: RESAMPLES,
            confidence: CONFIDENCE,
            models,
            comparisons: comparison::compare(measured, &self.dataset.source_names(), seed),
        }
    }
}

fn sandbox() -> Result<Sandbox> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let sandbox = Sandbox::open(&program, Limits::default())?;
    note(format!("answers in Python are run by {} without files, network or processes", sandbox.version()));
    Ok(sandbox)
}

/// Names the content of a model: another adapter of the same step is another model.
fn content_of(choice: &ModelChoice, label: &str, hash: &str, tokenizer: &ChatTokenizer) -> Result<String> {
    let weights = format!("{label}, weights {}, tokenizer {}", short(hash), short(tokenizer.hash()));
    let folder = match choice {
        ModelChoice::Adapter(Some(folder)) | ModelChoice::Folder(folder) => folder,
        ModelChoice::Base | ModelChoice::Merged | ModelChoice::Adapter(None) => return Ok(weights),
    };
    let file = folder.join(adapter::TENSORS_FILE);
    if !file.exists() {
        return Ok(weights);
    }
    Ok(format!("{weights}, adapter {}", hash_of(&file)?))
}

fn ask_one(
    task: &mut dyn Task,
    engine: &EngineHandle,
    speaker: &Speaker<'_>,
    folder: &Path,
) -> Result<TaskResults> {
    let start = Instant::now();
    let mut results = Results::<Answered>::open(&folder.join(format!("{}.jsonl", task.name())))?;
    let before = results.all().len();
    asking::ask(task, engine, speaker, &mut results)?;
    let tokens: usize = results.all()[before..].iter().map(|one| one.completion_tokens).sum();
    let seconds = start.elapsed().as_secs_f64();
    note(format!(
        "{:<16} {} questions, {before} of them before; {tokens} tokens in {seconds:.0} s",
        task.name(),
        results.all().len()
    ));
    Ok(TaskResults {
        name: task.name(),
        measures: task.measures(),
        answers: results.all().to_vec(),
        left_out: task.left_out(),
    })
}

/// The answers to each task, model by model.
fn shown(measured: &[Measured]) -> Vec<Shown<'_>> {
    let tasks = measured.first().map_or(&[][..], |model| &model.tasks);
    let shown = |task: &TaskResults| Shown {
        task: task.name,
        answers: measured.iter().map(|model| answers_of(model, task.name)).collect(),
    };
    tasks.iter().map(shown).collect()
}

fn answers_of<'a>(model: &'a Measured, task: &str) -> &'a [Answered] {
    model.tasks.iter().find(|one| one.name == task).map_or(&[], |one| &one.answers)
}

fn tell(report: &ModelReport) {
    let told = |Interval { estimate, low, high }| format!("{estimate:.4} ({low:.4} – {high:.4})");
    for loss in report.losses.iter().flat_map(|losses| losses.sources.iter().chain([&losses.overall])) {
        note(format!(
            "{:<10} loss {:<16} {}  {} tokens",
            report.name,
            loss.name,
            told(loss.loss),
            loss.tokens
        ));
    }
    for task in &report.tasks {
        for measure in &task.measures {
            let score = measure.score.map_or("–".to_string(), told);
            note(format!(
                "{:<10} {} {} {score}  {} questions",
                report.name, task.name, measure.name, task.scored
            ));
        }
    }
}
