//! `granite eval`: losses per source, task scores, models side by side, a report.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tch::Device;

use crate::checkpoint::adapter;
use crate::checkpoint::base::{BaseModel, open_tokenizer};
use crate::checkpoint::open::{self, ModelChoice, OpenModel};
use crate::checkpoint::run::RunFolder;
use crate::cli::EvalArgs;
use crate::data::reader::fingerprint;
use crate::data::store::{Dataset, PackedRow, Split};
use crate::data::tokenizer::ChatTokenizer;
use crate::engine::{Engine, EngineHandle, EngineOptions, memory};
use crate::error::user_error;
use crate::eval::asking::{self, Speaker};
use crate::eval::comparison::{self, Measured, TaskResults};
use crate::eval::given::GivenAnswers;
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
use crate::hex::{hex, short};
use crate::kernels::device;
use crate::model::decoder::Decoder;
use crate::progress::note;
use crate::recipe::{EvalSpec, Recipe};
use crate::stdout;

const PROGRAM: &str = concat!("granite ", env!("CARGO_PKG_VERSION"));
/// What is measured where nothing is named.
const ADAPTER: &str = "adapter";
const LOSSES: &str = "losses.jsonl";

/// Runs the subcommand.
///
/// # Errors
/// When a model, the dataset or a task's files are missing or damaged, the folder holds results of something else,
/// or a file cannot be written.
pub fn run(args: &EvalArgs) -> Result<()> {
    let mut recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let device = device::open(args.device)?;
    let run_folder = RunFolder::of(&recipe, None);
    let subjects = subjects_of(args, run_folder.path())?;
    let with_models = subjects.iter().any(|one| matches!(one.subject, Subject::Model(_)));
    if !with_models {
        recipe.eval = only_answered(recipe.eval, &args.answers);
    }
    let out = args.out.clone().unwrap_or_else(|| destination(&subjects, run_folder.path()));

    let with_dataset = with_models || recipe.eval.held_out.is_some();
    let held_out = if with_dataset { Some(HeldOutRows::open(&recipe)?) } else { None };
    let mut evaluation = Evaluation {
        recipe: &recipe,
        run_folder: run_folder.path(),
        device,
        batch: args.batch.map_or_else(|| batch_on(device), NonZero::get),
        tasks: Vec::new(),
        held_out,
    };
    evaluation.tasks = evaluation.open_tasks(args.limit)?;
    // What is mended after an error so far is no other evaluation: nothing is claimed before.
    subjects.iter().try_for_each(ensure_there)?;
    let mut identity = Identity::open(&out)?;
    if !identity.is_new() {
        note(format!("going on with what is in {}", out.display()));
    }
    let mut choices = choices(args, &recipe, &subjects, with_dataset)?;
    choices.extend(files_of(&evaluation.tasks)?);
    identity.claim(&choices)?;

    let (mut measured, mut reports) = (Vec::new(), Vec::new());
    for Named { name, subject } in &subjects {
        let (results, report) = match subject {
            Subject::Model(choice) => evaluation.measure(name, choice, &out, &mut identity)?,
            Subject::Answers(folder) => evaluation.judge(name, folder, &out, &mut identity)?,
        };
        tell(&report);
        measured.push(results);
        reports.push(report);
    }
    let report = evaluation.report(&measured, reports);
    report::write(&out, &report, &shown(&measured))?;
    note(format!("report in {}", out.display()));
    if args.json {
        stdout::json(&report)?;
    }
    Ok(())
}

/// What is measured, by name.
#[derive(Debug)]
struct Named {
    /// Its name in reports, and of the folder of its results.
    name: String,
    subject: Subject,
}

#[derive(Debug)]
enum Subject {
    Model(ModelChoice),
    /// A folder of answers that are written already.
    Answers(PathBuf),
}

/// Models and answers by name; `adapter` is pinned to the newest checkpoint of this moment.
fn subjects_of(args: &EvalArgs, run_folder: &Path) -> Result<Vec<Named>> {
    let default = [ADAPTER.to_string()];
    let asked = if args.model.is_empty() && args.answers.is_empty() { &default[..] } else { &args.model };
    let mut subjects: Vec<Named> = Vec::new();
    let models = asked.iter().map(|text| model_of(text, run_folder));
    let answers = args.answers.iter().map(|folder| {
        Ok(Named { name: last_part(folder, "answers"), subject: Subject::Answers(folder.clone()) })
    });
    for subject in models.chain(answers) {
        let subject = subject?;
        if subjects.iter().any(|other| other.name == subject.name) {
            return Err(user_error(
                format!("two models are called `{}`", subject.name),
                "name each model once; folders are called by their last part",
            ));
        }
        subjects.push(subject);
    }
    Ok(subjects)
}

/// That the folder that is named is one.
fn ensure_there(subject: &Named) -> Result<()> {
    let folder = match &subject.subject {
        Subject::Model(ModelChoice::Folder(folder)) | Subject::Answers(folder) => folder,
        Subject::Model(_) => return Ok(()),
    };
    if folder.exists() {
        return Ok(());
    }
    Err(user_error(
        format!("there is no folder `{}`", folder.display()),
        "name `base`, `adapter`, `merged`, or the folder of a model, an adapter or answers",
    ))
}

fn model_of(text: &str, run_folder: &Path) -> Result<Named> {
    let choice: ModelChoice = text.parse().unwrap_or_else(|never| match never {});
    let choice = match choice {
        ModelChoice::Adapter(None) => ModelChoice::Adapter(Some(open::newest_checkpoint(run_folder)?)),
        other => other,
    };
    let name = match &choice {
        ModelChoice::Folder(folder) => last_part(folder, "folder"),
        _ => text.to_string(),
    };
    Ok(Named { name, subject: Subject::Model(choice) })
}

fn last_part(folder: &Path, otherwise: &str) -> String {
    folder.file_name().map_or_else(|| otherwise.to_string(), |name| name.to_string_lossy().into_owned())
}

/// `eval-<models>` in the run's folder.
fn destination(subjects: &[Named], run_folder: &Path) -> PathBuf {
    run_folder.join(format!("eval-{}", names(subjects).join("-")))
}

fn names(subjects: &[Named]) -> Vec<&str> {
    subjects.iter().map(|one| one.name.as_str()).collect()
}

/// The recipe's tasks that one of the folders answers: without a model, the others' files need not be there.
fn only_answered(eval: EvalSpec, folders: &[PathBuf]) -> EvalSpec {
    let EvalSpec { seed, held_out, spider, convfinqa, finqa, gsm8k, humaneval, mbpp } = eval;
    EvalSpec {
        seed,
        held_out: answered(held_out, "held_out", folders),
        spider: answered(spider, "spider", folders),
        convfinqa: answered(convfinqa, "convfinqa", folders),
        finqa: answered(finqa, "finqa", folders),
        gsm8k: answered(gsm8k, "gsm8k", folders),
        humaneval: answered(humaneval, "humaneval", folders),
        mbpp: answered(mbpp, "mbpp", folders),
    }
}

fn answered<T>(spec: Option<T>, task: &str, folders: &[PathBuf]) -> Option<T> {
    spec.filter(|_| folders.iter().any(|folder| answers_to(folder, task).exists()))
}

/// Answers that are written already, in the form of our own results.
fn answers_to(folder: &Path, task: &str) -> PathBuf {
    folder.join(format!("{task}.jsonl"))
}

/// What decides the numbers, whatever the model.
fn choices(
    args: &EvalArgs,
    recipe: &Recipe,
    subjects: &[Named],
    with_dataset: bool,
) -> Result<Vec<(String, String)>> {
    let mut choices = vec![
        ("program".to_string(), PROGRAM.to_string()),
        ("list of models".to_string(), names(subjects).join(", ")),
        ("limit".to_string(), args.limit.map_or("none".to_string(), |limit| limit.to_string())),
        ("template".to_string(), serde_json::to_string(&recipe.data.template)?),
    ];
    if with_dataset {
        let rows = hash_of(&recipe.data.dataset.join("validation.parquet"))?;
        choices.push(("dataset".to_string(), format!("{} (SHA-256 {rows})", recipe.data.dataset.display())));
    }
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
    let tables = spider.as_ref().map(|spec| spec.tables.as_path());
    add("spider.tables", tables, json(&tables)?)?;
    add("convfinqa", convfinqa.as_ref().map(|spec| spec.path.as_path()), json(convfinqa)?)?;
    add("finqa", finqa.as_ref().map(|spec| spec.path.as_path()), json(finqa)?)?;
    for (name, spec) in [("gsm8k", gsm8k), ("humaneval", humaneval), ("mbpp", mbpp)] {
        add(name, spec.as_ref().map(|spec| spec.path.as_path()), json(spec)?)?;
    }
    Ok(choices)
}

/// What the tasks' further files hold, a name a task that has any.
fn files_of(tasks: &[Box<dyn Task>]) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for task in tasks {
        let files = task.files()?;
        if files.is_empty() {
            continue;
        }
        let mut hash = Sha256::new();
        for file in &files {
            hash.update(fingerprint(file)?.sha256);
        }
        let content = format!("{} files, SHA-256 {}", files.len(), short(&hex(&hash.finalize())));
        found.push((format!("content of {}'s folder", task.name()), content));
    }
    Ok(found)
}

fn json(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string(value)?)
}

fn hash_of(path: &Path) -> Result<String> {
    Ok(short(&fingerprint(path)?.sha256).to_string())
}

/// A dataset's rows that no training saw.
struct HeldOutRows {
    dataset: Dataset,
    rows: Vec<PackedRow>,
}

impl HeldOutRows {
    fn open(recipe: &Recipe) -> Result<Self> {
        let dataset = Dataset::open(&recipe.data.dataset)?;
        let rows = dataset.rows(Split::Validation)?;
        if rows.is_empty() {
            note("note: the dataset holds no row out: set `data.validation_fraction` to measure losses");
        }
        Ok(Self { dataset, rows })
    }
}

/// What is the same for all models.
struct Evaluation<'a> {
    recipe: &'a Recipe,
    run_folder: &'a Path,
    device: Device,
    /// Questions answered at once.
    batch: usize,
    /// Absent where given answers alone are judged, and none of them is to held-out rows.
    held_out: Option<HeldOutRows>,
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
            let HeldOutRows { dataset, .. } = self.held_out()?;
            dataset.check_tokenizer(&tokenizer)?;
            tasks.push(Box::new(HeldOut::open(spec, limit, dataset, &tokenizer)?));
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
            let sandbox = Arc::new(sandbox()?);
            if let Some(spec) = humaneval {
                tasks.push(Box::new(Code::human_eval(spec, limit, Arc::clone(&sandbox))?));
            }
            if let Some(spec) = mbpp {
                tasks.push(Box::new(Code::mbpp(spec, limit, sandbox)?));
            }
        }
        Ok(tasks)
    }

    fn held_out(&self) -> Result<&HeldOutRows> {
        self.held_out.as_ref().context("the dataset was not opened")
    }

    fn source_names(&self) -> Vec<&str> {
        self.held_out.as_ref().map(|rows| rows.dataset.source_names()).unwrap_or_default()
    }

    /// Measures a model, or what of it is not measured yet.
    fn measure(
        &mut self,
        name: &str,
        choice: &ModelChoice,
        out: &Path,
        identity: &mut Identity,
    ) -> Result<(Measured, ModelReport)> {
        let OpenModel { decoder, base, quantization, label } =
            open::open(self.recipe, choice, self.run_folder, self.device)?;
        let tokenizer = ChatTokenizer::new(&base.tokenizer, &self.recipe.data.template)?;
        let HeldOutRows { dataset, rows } = self.held_out()?;
        dataset.check_tokenizer(&tokenizer)?;
        let held = format!("{} in {:?}", serde_json::to_string(&quantization)?, decoder.kind());
        let content = content_of(choice, &format!("{label}, {held}"), &base, &tokenizer)?;
        identity.claim(&[(format!("model `{name}`"), content)])?;
        let folder = results_of(out, name)?;

        let mut losses = Results::<RowLosses>::open(&folder.join(LOSSES))?;
        row_losses::measure(&decoder, rows, &mut losses)?;
        let tasks = self.ask(decoder, &tokenizer, &folder)?;
        let measured = Measured { name: name.to_string(), losses: losses.all().to_vec(), tasks };
        let report = self.model_report(&measured, label, &base.path, Some(base.hash.clone()));
        Ok((measured, report))
    }

    fn model_report(
        &self,
        measured: &Measured,
        label: String,
        path: &Path,
        base_hash: Option<String>,
    ) -> ModelReport {
        let seed = self.recipe.eval.seed;
        ModelReport {
            name: measured.name.clone(),
            label,
            path: path.display().to_string(),
            base_hash,
            results: measured.name.clone(),
            losses: comparison::losses(&measured.losses, &self.source_names(), seed),
            tasks: measured.tasks.iter().map(|task| comparison::task(task, seed)).collect(),
        }
    }

    /// Judges a folder of answers, or what of it is not judged yet.
    fn judge(
        &mut self,
        name: &str,
        given: &Path,
        out: &Path,
        identity: &mut Identity,
    ) -> Result<(Measured, ModelReport)> {
        let answered = |task: &&mut Box<dyn Task>| answers_to(given, task.name()).exists();
        let mut answered: Vec<&mut Box<dyn Task>> = self.tasks.iter_mut().filter(answered).collect();
        if answered.is_empty() {
            return Err(no_answers(given));
        }
        // All are read before anything is claimed: what is mended after an error is no other evaluation.
        let (mut files, mut hashes) = (Vec::new(), Vec::new());
        for task in &answered {
            let path = answers_to(given, task.name());
            files.push(GivenAnswers::read(&path, task.as_ref())?);
            hashes.push(format!("{} {}", task.name(), hash_of(&path)?));
        }
        identity.claim(&[(format!("answers `{name}`"), format!("SHA-256 of {}", hashes.join(", ")))])?;
        let folder = results_of(out, name)?;
        let both = answered.iter_mut().zip(&files);
        let tasks = both.map(|(task, file)| judge_one(task.as_mut(), file, &folder));
        let tasks = tasks.collect::<Result<Vec<TaskResults>>>()?;
        let measured = Measured { name: name.to_string(), losses: Vec::new(), tasks };
        let report = self.model_report(&measured, "given answers".to_string(), given, None);
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
        let options = EngineOptions {
            queue: asking::under_way(self.batch),
            context: None,
            batch: self.batch,
            cached_tokens: memory::cached_tokens(&decoder),
        };
        let engine = Engine::spawn(decoder, &options)?;
        self.tasks.iter_mut().map(|task| ask_one(task.as_mut(), &engine, &speaker, folder)).collect()
    }

    fn report(&self, measured: &[Measured], models: Vec<ModelReport>) -> Report {
        let seed = self.recipe.eval.seed;
        Report {
            format_version: FORMAT_VERSION,
            program: PROGRAM.to_string(),
            recipe: self.recipe.name.clone(),
            dataset: self.held_out.as_ref().map(|_| self.recipe.data.dataset.display().to_string()),
            seed,
            resamples: RESAMPLES,
            confidence: CONFIDENCE,
            models,
            comparisons: comparison::compare(measured, &self.source_names(), seed),
        }
    }
}

/// The folder of a model's results, made where it is missing.
fn results_of(out: &Path, name: &str) -> Result<PathBuf> {
    let folder = out.join(name);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create folder `{}`", folder.display()))?;
    Ok(folder)
}

fn no_answers(folder: &Path) -> anyhow::Error {
    user_error(
        format!("`{}` holds no answers to any task of the recipe", folder.display()),
        "write `TASK.jsonl` with `id` and `answer` a line, where the recipe has a part `eval.TASK`",
    )
}

/// How many at once when nobody says: a GPU needs more to be busy, and has the memory for them.
fn batch_on(device: Device) -> usize {
    if device.is_cuda() { 64 } else { 16 }
}

fn sandbox() -> Result<Sandbox> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let sandbox = Sandbox::open(&program, Limits::default())?;
    note(format!("answers in Python are run by {} without files, network or processes", sandbox.version()));
    Ok(sandbox)
}

/// Names the content of a model: another adapter of the same step is another model.
fn content_of(
    choice: &ModelChoice,
    label: &str,
    base: &BaseModel,
    tokenizer: &ChatTokenizer,
) -> Result<String> {
    let weights = format!(
        "{label}, weights {}, configuration {}, tokenizer {}",
        short(&base.hash),
        short(&hex(&Sha256::digest(serde_json::to_vec(&base.config)?))),
        short(tokenizer.hash())
    );
    let folder = match choice {
        ModelChoice::Adapter(Some(folder)) | ModelChoice::Folder(folder) => folder,
        ModelChoice::Base | ModelChoice::Merged | ModelChoice::Adapter(None) => return Ok(weights),
    };
    let file = folder.join(adapter::TENSORS_FILE);
    if !file.exists() {
        return Ok(weights);
    }
    Ok(format!("{weights}, adapter {} {}", hash_of(&file)?, hash_of(&folder.join(adapter::CONFIG_FILE))?))
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
        "{:<16} {} questions, {before} of them before; {tokens} tokens in {seconds:.0} s, {:.0} tokens/s",
        task.name(),
        results.all().len(),
        tokens as f64 / seconds
    ));
    Ok(summed_up(task, &results))
}

fn judge_one(task: &mut dyn Task, given: &GivenAnswers, folder: &Path) -> Result<TaskResults> {
    let mut results = Results::<Answered>::open(&folder.join(format!("{}.jsonl", task.name())))?;
    given.judge(task, &mut results)?;
    Ok(summed_up(task, &results))
}

fn summed_up(task: &dyn Task, results: &Results<Answered>) -> TaskResults {
    TaskResults {
        name: task.name(),
        measures: task.measures(),
        answers: results.all().to_vec(),
        left_out: task.left_out(),
    }
}

/// The answers to each task, model by model; a task that not all answered as well.
fn shown(measured: &[Measured]) -> Vec<Shown<'_>> {
    let mut tasks: Vec<&str> = Vec::new();
    for task in measured.iter().flat_map(|model| &model.tasks) {
        if !tasks.contains(&task.name) {
            tasks.push(task.name);
        }
    }
    let answers = |task: &str| measured.iter().map(|model| answers_of(model, task)).collect();
    tasks.into_iter().map(|task| Shown { task, answers: answers(task) }).collect()
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
