//! `granite serve`: opens the documents and the model, then answers until it is told to stop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::json;
use tch::Device;

use crate::checkpoint::open::{self, MERGED, ModelChoice};
use crate::checkpoint::run::RunFolder;
use crate::cli::ServeArgs;
use crate::data::tokenizer::ChatTokenizer;
use crate::engine::{Engine, EngineOptions, memory};
use crate::error::user_error;
use crate::kernels::{device, exit_now};
use crate::progress;
use crate::recipe::{Recipe, ServeSpec};
use crate::retrieval::documents;
use crate::retrieval::encoder::Encoder;
use crate::retrieval::index::Index;
use crate::serve::limits::listen_address;
use crate::serve::run as service;
use crate::serve::{Library, Service, Settings};
use crate::stdout;

/// Runs the subcommand.
///
/// # Errors
/// When the address may not or cannot be listened on, or when documents, encoder or model cannot be opened.
pub fn run(args: &ServeArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let run = RunFolder::of(&recipe, None);
    let run_folder = run.path();
    let spec = &recipe.serve;
    let api_key = args.api_key.clone().or_else(|| spec.api_key.clone());
    let host = args.host.as_deref().unwrap_or(&spec.host);
    // What is cheap to refuse is refused before anything is loaded.
    let address = listen_address(host, args.port.unwrap_or(spec.port), api_key.as_deref())?;
    check(spec)?;
    let choice = choose(args.model.as_deref(), run_folder);
    let device = device::open(args.device)?;
    let folder = args.documents.as_ref().or(spec.documents.as_ref());
    let library = folder.map(|folder| open_library(folder, spec, run_folder, device)).transpose()?;
    if library.is_none() {
        progress::note("note: no documents, `/query` answers from the model alone");
    }
    let settings = Settings {
        model: model_name(&recipe, &choice),
        api_key,
        top_k: spec.top_k,
        max_tokens: spec.max_tokens,
        queue: spec.queue,
    };
    let service = open_service(&recipe, &choice, run_folder, device, library, settings)?;
    service::run(service, address, announce)?;
    // An answer that was cut off is computed to the end of its step, and nobody waits for it.
    exit_now(0)
}

/// What would leave the service without an answer to give.
fn check(spec: &ServeSpec) -> Result<()> {
    let ServeSpec { batch, queue, max_tokens, context, .. } = *spec;
    let least = [("batch", batch), ("queue", queue), ("max_tokens", max_tokens), ("context", context)];
    match least.into_iter().find(|(_, value)| *value == 0) {
        Some((key, _)) => {
            Err(user_error(format!("`serve.{key}` is 0, expected 1 or more"), "mend the recipe"))
        }
        None => Ok(()),
    }
}

/// What was asked for; else the merged model, else the newest adapter, else the base model, and says which.
fn choose(asked: Option<&str>, run_folder: &Path) -> ModelChoice {
    if let Some(Ok(choice)) = asked.map(str::parse) {
        return choice;
    }
    if run_folder.join(MERGED).is_dir() {
        return ModelChoice::Merged;
    }
    match open::newest_checkpoint(run_folder) {
        Ok(folder) => ModelChoice::Adapter(Some(folder)),
        Err(_) => {
            progress::note(format!(
                "note: `{}` holds neither a merged model nor a checkpoint, the base model answers",
                run_folder.display()
            ));
            ModelChoice::Base
        }
    }
}

/// `smollm2-135m-cpu-merged`: clients see what they are speaking to.
fn model_name(recipe: &Recipe, choice: &ModelChoice) -> String {
    let of_folder = |folder: &Path| folder.file_name().map(|name| name.to_string_lossy().into_owned());
    match choice {
        ModelChoice::Base => format!("{}-base", recipe.name),
        ModelChoice::Adapter(_) => format!("{}-adapter", recipe.name),
        ModelChoice::Merged => format!("{}-merged", recipe.name),
        ModelChoice::Folder(folder) => of_folder(folder).unwrap_or_else(|| recipe.name.clone()),
    }
}

/// Reads the documents and brings their index up to date.
fn open_library(folder: &Path, spec: &ServeSpec, run_folder: &Path, device: Device) -> Result<Library> {
    let Some(encoder) = &spec.encoder else {
        return Err(user_error(
            format!("there are documents (`{}`), but no encoder to find them by", folder.display()),
            "set `serve.encoder` to a sentence-transformers folder such as all-MiniLM-L6-v2",
        ));
    };
    let documents = documents::load_folder(folder)?;
    let started = Instant::now();
    let encoder = Encoder::open(encoder, device)?;
    let cache: PathBuf = spec.index.clone().unwrap_or_else(|| run_folder.join("index"));
    let (index, work) = Index::build(documents, &encoder, Some(&cache))?;
    progress::note(format!(
        "{} documents in {} passages: {} encoded, {} from `{}`, {:.1} s",
        index.documents().len(),
        index.passages().len(),
        work.encoded,
        work.reused,
        cache.display(),
        started.elapsed().as_secs_f64()
    ));
    Ok(Library::new(encoder, index))
}

fn open_service(
    recipe: &Recipe,
    choice: &ModelChoice,
    run_folder: &Path,
    device: Device,
    library: Option<Library>,
    settings: Settings,
) -> Result<Service> {
    let started = Instant::now();
    let model = open::open(recipe, choice, run_folder, device)?;
    let tokenizer = ChatTokenizer::new(&model.base.tokenizer, &recipe.data.template)
        .with_context(|| format!("cannot speak to the model `{}`", model.base.path.display()))?;
    let ServeSpec { batch, queue, context, .. } = recipe.serve;
    let cached_tokens = memory::cached_tokens(&model.decoder);
    let options = EngineOptions { queue, context: Some(context), batch, cached_tokens };
    let engine = Engine::spawn(model.decoder, &options)?;
    progress::note(format!(
        "model `{}` ({}) on {device:?}, context {}, {:.1} s",
        settings.model,
        model.label,
        engine.context(),
        started.elapsed().as_secs_f64()
    ));
    Ok(Service::new(engine, tokenizer, library, settings))
}

/// Tells people on stderr and scripts on stdout where the service is.
fn announce(address: SocketAddr) -> Result<()> {
    let url = format!("http://{address}");
    progress::note(format!("listening on {url}"));
    stdout::text(&json!({"url": url}).to_string())
}
