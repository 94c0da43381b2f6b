//! `granite eval`: losses per source, task scores, a report.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::checkpoint::base::BaseModel;
use crate::checkpoint::open::{self, ModelChoice, OpenModel};
use crate::checkpoint::run::RunFolder;
use crate::cli::EvalArgs;
use crate::data::example::{Message, Role};
use crate::data::source::spider::Schemas;
use crate::data::store::{Dataset, Split};
use crate::data::tokenizer::ChatTokenizer;
use crate::engine::{Engine, EngineOptions};
use crate::eval::database::QueryLimits;
use crate::eval::report::{self, FORMAT_VERSION, Report};
use crate::eval::tasks::spider::{self, Databases, Question, Speaker, SpiderReport};
use crate::kernels::device;
use crate::losses::{self, LossReport};
use crate::model::decoder::Decoder;
use crate::output::Staged;
use crate::progress::note;
use crate::recipe::{Recipe, SpiderEvalSpec};

const PREDICTIONS: &str = "predictions.jsonl";

/// Runs the subcommand.
///
/// # Errors
/// When the model, the dataset or a task's files are missing or damaged, or the report cannot be written.
pub fn run(args: &EvalArgs) -> Result<()> {
    let start = Instant::now();
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let device = device::open(args.device)?;
    let run_folder = RunFolder::of(&recipe, None);
    let choice: ModelChoice = args.model.parse().unwrap_or_else(|never| match never {});
    let out = destination(args, &choice, run_folder.path());
    let OpenModel { decoder, base, label } = open::open(&recipe, &choice, run_folder.path(), device)?;
    let tokenizer = ChatTokenizer::new(&base.tokenizer, &recipe.data.template)?;
    let staged = Staged::folder(&out)?;
    let validation = losses(&recipe, &decoder, &tokenizer)?;
    let spider = match &recipe.eval.spider {
        Some(spec) => Some(score_spider(spec, args.limit, decoder, &tokenizer, staged.path())?),
        None => None,
    };
    let report = report_of(&recipe, &base, label, validation, spider, start);
    report::write(staged.path(), &report)?;
    staged.commit()?;
    tell(&report, &out);
    if args.json {
        let mut stdout = std::io::stdout().lock();
        serde_json::to_writer_pretty(&mut stdout, &report)?;
        writeln!(stdout).context("cannot write to stdout")?;
    }
    Ok(())
}

/// `eval-<model>` in the run's folder; a folder is called by its last name.
fn destination(args: &EvalArgs, choice: &ModelChoice, run_folder: &Path) -> PathBuf {
    let name = match choice {
        ModelChoice::Folder(folder) => folder
            .file_name()
            .map_or_else(|| "folder".to_string(), |name| name.to_string_lossy().into_owned()),
        ModelChoice::Base | ModelChoice::Adapter(_) | ModelChoice::Merged => args.model.clone(),
    };
    args.out.clone().unwrap_or_else(|| run_folder.join(format!("eval-{name}")))
}

fn losses(recipe: &Recipe, decoder: &Decoder, tokenizer: &ChatTokenizer) -> Result<Option<LossReport>> {
    let dataset = Dataset::open(&recipe.data.dataset)?;
    dataset.check_tokenizer(tokenizer)?;
    let rows = dataset.rows(Split::Validation)?;
    if rows.is_empty() {
        note("note: the dataset holds no row out: set `data.validation_fraction` to measure losses");
    }
    losses::measure(decoder, &rows, &dataset.source_names())
}

fn score_spider(
    spec: &SpiderEvalSpec,
    limit: Option<usize>,
    decoder: Decoder,
    tokenizer: &ChatTokenizer,
    folder: &Path,
) -> Result<SpiderReport> {
    let schemas = Schemas::read(&spec.tables)?;
    let questions = spider::read_questions(&spec.path)?;
    let mut databases = Databases::new(&spec.databases, QueryLimits::default());
    let selection = spider::select(&questions, &mut databases, limit.or(spec.limit))?;
    let prompt = |question: &Question| {
        let text = schemas.prompt(&question.db_id, &question.question)?;
        tokenizer.encode_prompt(&[Message::new(Role::User, text)])
    };
    let speaker = Speaker {
        prompt: &prompt,
        decode: &|ids| tokenizer.decode(ids, true),
        stop_token_ids: tokenizer.eos_token_ids().to_vec(),
        max_tokens: spec.max_tokens,
    };
    let engine = Engine::spawn(decoder, &EngineOptions { queue: spider::UNDER_WAY, context: None })?;
    let path = folder.join(PREDICTIONS);
    let in_file = || format!("cannot write `{}`", path.display());
    let mut lines = BufWriter::new(File::create(&path).with_context(in_file)?);
    let predictions = spider::ask(&questions, &selection, &mut databases, &engine, &speaker, |prediction| {
        serde_json::to_writer(&mut lines, prediction)?;
        lines.write_all(b"\n").with_context(in_file)
    })?;
    lines.flush().with_context(in_file)?;
    Ok(spider::summarize(&predictions, questions.len(), &selection))
}

fn report_of(
    recipe: &Recipe,
    base: &BaseModel,
    model: String,
    validation: Option<LossReport>,
    spider: Option<SpiderReport>,
    start: Instant,
) -> Report {
    Report {
        format_version: FORMAT_VERSION,
        program: concat!("granite ", env!("CARGO_PKG_VERSION")).to_string(),
        recipe: recipe.name.clone(),
        model,
        model_path: base.path.display().to_string(),
        base_hash: base.hash.clone(),
        dataset: recipe.data.dataset.display().to_string(),
        validation,
        spider,
        seconds: start.elapsed().as_secs_f64(),
    }
}

fn tell(report: &Report, out: &Path) {
    if let Some(losses) = &report.validation {
        for source in losses.sources.iter().chain([&losses.overall]) {
            note(format!(
                "{:<16} loss {:.4}  perplexity {:.3}  {} tokens",
                source.name, source.loss, source.perplexity, source.tokens
            ));
        }
    }
    if let Some(spider) = &report.spider {
        note(format!(
            "spider           execution accuracy {:.3}  {} of {} correct, {} ran",
            spider.execution_accuracy, spider.correct, spider.scored, spider.executable
        ));
    }
    note(format!("report in {}", out.display()));
}
