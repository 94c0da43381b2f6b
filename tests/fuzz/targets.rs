//! What reads files that others made, each behind one function from bytes to an end without a panic.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use granite::checkpoint::gguf::GgufFile;
use granite::checkpoint::hugging_face::{self, FolderTensors};
use granite::checkpoint::nf4_cache::Nf4Cache;
use granite::checkpoint::run::RunFolder;
use granite::checkpoint::safetensors::MappedTensors;
use granite::checkpoint::{adapter, tensor_file, tokenizer_files};
use granite::data::example::{Message, Role};
use granite::data::reader::{files_of, read_records};
use granite::data::source::card::SourceCard;
use granite::data::source::collect;
use granite::data::source::spider::Schemas;
use granite::data::store::{Dataset, Split};
use granite::data::template::{ChatTemplate, Conversation};
use granite::data::tokenizer::{ChatTokenizer, TokenizerFiles};
use granite::eval::hardness::Hardness;
use granite::eval::{fence, finance_program, number, rouge, sql};
use granite::model::weights::TensorSource;
use granite::recipe::{Recipe, TemplateSpec};
use tch::Device;

/// A reader: takes a folder of its own, where it may find what stays the same, and the bytes.
pub type Target = fn(&Path, &[u8]) -> Result<()>;

/// All targets by name.
pub const TARGETS: [(&str, Target); 20] = [
    ("records", records),
    ("columns", records),
    ("saved_folder", saved_folder),
    ("sources", sources),
    ("card", card),
    ("schemas", schemas),
    ("answer", answer),
    ("recipe", recipe),
    ("template", template),
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("weights", weights),
    ("model_config", model_config),
    ("adapter_config", adapter_config),
    ("adapter_tensors", adapter_tensors),
    ("tokenizer_json", tokenizer_json),
    ("tokenizer_config", tokenizer_config),
    ("dataset_rows", dataset_rows),
    ("run_state", run_state),
    ("nf4_cache", nf4_cache),
];

/// Where the tiny models lie; elsewhere when the program was carried to another machine.
pub fn fixtures() -> PathBuf {
    std::env::var_os("GRANITE_FUZZ_FIXTURES").map_or_else(|| PathBuf::from(crate::FIXTURES), PathBuf::from)
}

/// A dump: JSON array or lines, CSV, TSV, parquet, Arrow; plain, gzip, zstd or zip.
pub fn records(folder: &Path, bytes: &[u8]) -> Result<()> {
    let path = folder.join("dump");
    fs::write(&path, bytes)?;
    read_records::<serde_json::Value>(&path, &["train.json"], &["data"], &mut |_, _| Ok(()))
}

/// The notes of a folder that `datasets` saved.
pub fn saved_folder(folder: &Path, bytes: &[u8]) -> Result<()> {
    fs::create_dir_all(folder.join("train"))?;
    fs::write(folder.join("train/state.json"), bytes)?;
    let _ = files_of(&folder.join("train"), &[]);
    fs::write(folder.join("dataset_dict.json"), bytes)?;
    files_of(folder, &[])?;
    Ok(())
}

/// A dump as the sources that are built in understand it, and one with a card.
pub fn sources(folder: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(folder.join("dump"), bytes)?;
    put(folder, "tables.json", "../../datasets/sample/spider/tables.json")?;
    fs::write(folder.join("card.toml"), CARD)?;
    for source in SOURCES {
        let text = source.replace("FOLDER", &folder.display().to_string());
        let text = format!("name = \"x\"\n[model]\nbase = \"y\"\n[data.sources.{text}\n");
        let _ = collect(&Recipe::parse(&text, Path::new("recipe.toml"), &[])?.data);
    }
    Ok(())
}

const SOURCES: [&str; 6] = [
    "dolly]\npath = \"FOLDER/dump\"",
    "finance_alpaca]\npath = \"FOLDER/dump\"",
    "code_alpaca]\npath = \"FOLDER/dump\"",
    "convfinqa]\npath = \"FOLDER/dump\"\ntarget = \"program_then_answer\"",
    "spider]\npath = \"FOLDER/dump\"\ntables = \"FOLDER/tables.json\"",
    "talk]\npath = \"FOLDER/dump\"\ncard = \"FOLDER/card.toml\"",
];

/// The card of a source of conversations.
pub const CARD: &str = "title = \"Talk\"\nlicence = \"MIT\"\ncommercial_use = true\n[fields]\nmessages = \"a.turns\"\nrole = \"who\"\ncontent = \"said\"\n";

/// A source's card.
pub fn card(folder: &Path, bytes: &[u8]) -> Result<()> {
    let path = folder.join("card.toml");
    fs::write(&path, bytes)?;
    SourceCard::read(&path)?;
    Ok(())
}

/// Spider's `tables.json`.
pub fn schemas(folder: &Path, bytes: &[u8]) -> Result<()> {
    let path = folder.join("tables.json");
    fs::write(&path, bytes)?;
    Schemas::read(&path)?;
    Ok(())
}

/// What a model said, taken apart by every task that looks into answers.
pub fn answer(_: &Path, bytes: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(bytes);
    let query = sql::as_evaluated(&sql::extract(&text));
    sql::orders_rows(&query);
    Hardness::of(&text);
    number::last(&text);
    fence::code(&text);
    rouge::rouge_l("the cat sat on the mat", &text);
    let row = |cells: [&str; 3]| cells.map(str::to_string).to_vec();
    finance_program::execute(
        &text,
        &[row(["", "2014", "2013"]), row(["net sales", "$ 1,200.5", "-4.1 ( 4.1 )"])],
    )?;
    Ok(())
}

/// A recipe.
pub fn recipe(_: &Path, bytes: &[u8]) -> Result<()> {
    Recipe::parse(&String::from_utf8_lossy(bytes), Path::new("recipe.toml"), &[])?;
    Ok(())
}

/// A chat template.
pub fn template(_: &Path, bytes: &[u8]) -> Result<()> {
    let files = TokenizerFiles {
        chat_template: Some(String::from_utf8_lossy(bytes).into_owned()),
        eos_token: Some("<|im_end|>".to_string()),
        ..TokenizerFiles::default()
    };
    let template = ChatTemplate::new(&files, &TemplateSpec::default(), vec!["<|im_end|>".to_string()])?;
    let messages = conversation();
    template.render_supervised(&messages)?;
    template.render(Conversation {
        messages: &messages,
        add_generation_prompt: true,
        ..Conversation::default()
    })?;
    Ok(())
}

fn conversation() -> [Message; 3] {
    [
        Message::new(Role::System, "You help."),
        Message::new(Role::User, "What is 2 + 2?"),
        Message::new(Role::Assistant, "4"),
    ]
}

/// A GGUF file: header, metadata, tokenizer, blocks.
pub fn gguf(folder: &Path, bytes: &[u8]) -> Result<()> {
    let path = folder.join("model.gguf");
    fs::write(&path, bytes)?;
    let file = GgufFile::open(&path)?;
    let _ = file.tokenizer();
    file.fingerprint();
    every_tensor(&file);
    Ok(())
}

/// A safetensors file, mapped and read whole.
pub fn safetensors(folder: &Path, bytes: &[u8]) -> Result<()> {
    let path = folder.join("some.safetensors");
    fs::write(&path, bytes)?;
    let _ = tensor_file::read(&path);
    let file = MappedTensors::open(&path)?;
    for name in file.names() {
        let _ = file.tensor(name);
    }
    Ok(())
}

/// A folder's weights, of which some are in bitsandbytes' 4 bits.
pub fn weights(folder: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(folder.join("model.safetensors"), bytes)?;
    let tensors = FolderTensors::open(folder)?;
    tensors.fingerprint();
    every_tensor(&tensors);
    Ok(())
}

fn every_tensor(source: &dyn TensorSource) {
    for name in source.names() {
        let _ = source.shape(&name);
        let _ = source.tensor(&name);
        let _ = source.nf4(&name, Device::Cpu);
    }
}

/// A `config.json`.
pub fn model_config(folder: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(folder.join("config.json"), bytes)?;
    hugging_face::read_config(folder)?;
    Ok(())
}

/// PEFT's configuration beside tensors that are whole.
pub fn adapter_config(folder: &Path, bytes: &[u8]) -> Result<()> {
    put(folder, "adapter_model.safetensors", "tiny-granite/adapter/adapter_model.safetensors")?;
    fs::write(folder.join("adapter_config.json"), bytes)?;
    adapter::load(folder)?;
    Ok(())
}

/// PEFT's tensors beside a configuration that is whole.
pub fn adapter_tensors(folder: &Path, bytes: &[u8]) -> Result<()> {
    put(folder, "adapter_config.json", "tiny-granite/adapter/adapter_config.json")?;
    fs::write(folder.join("adapter_model.safetensors"), bytes)?;
    adapter::load(folder)?;
    Ok(())
}

/// A file of the fixtures, copied once.
fn put(folder: &Path, name: &str, fixture: &str) -> Result<()> {
    let path = folder.join(name);
    if !path.exists() {
        fs::copy(fixtures().join(fixture), path)?;
    }
    Ok(())
}

/// A `tokenizer.json`.
pub fn tokenizer_json(folder: &Path, bytes: &[u8]) -> Result<()> {
    put(folder, "tokenizer_config.json", "tiny-granite/tokenizer_config.json")?;
    fs::write(folder.join("tokenizer.json"), bytes)?;
    speak(folder)
}

/// A `tokenizer_config.json`.
pub fn tokenizer_config(folder: &Path, bytes: &[u8]) -> Result<()> {
    put(folder, "tokenizer.json", "tiny-granite/tokenizer.json")?;
    fs::write(folder.join("tokenizer_config.json"), bytes)?;
    speak(folder)
}

fn speak(folder: &Path) -> Result<()> {
    let files = tokenizer_files::read(folder, None)?;
    let tokenizer = ChatTokenizer::new(&files, &TemplateSpec::default())?;
    let encoded = tokenizer.encode_chat(&conversation())?;
    tokenizer.decode(&encoded.ids, false)?;
    Ok(())
}

/// The rows of a prepared dataset.
pub fn dataset_rows(folder: &Path, bytes: &[u8]) -> Result<()> {
    // A manifest when it looks like one, else rows.
    if bytes.first() == Some(&b'{') {
        fs::write(folder.join("manifest.json"), bytes)?;
        Dataset::open(folder)?;
        return Ok(());
    }
    fs::write(folder.join("validation.parquet"), bytes)?;
    let manifest = crate::seeds::manifest();
    Dataset { folder: folder.to_path_buf(), manifest }.rows(Split::Validation)?;
    Ok(())
}

/// State and moments of a checkpoint.
pub fn run_state(folder: &Path, bytes: &[u8]) -> Result<()> {
    let recipe = Recipe::parse("name = \"x\"\n[model]\nbase = \"y\"\n", Path::new("recipe.toml"), &[])?;
    let run = RunFolder::of(&recipe, Some(folder));
    let step = run.step(1);
    fs::create_dir_all(&step)?;
    fs::write(step.join("state.json"), bytes)?;
    fs::write(step.join("optimizer.safetensors"), bytes)?;
    let _ = run.load_optimizer(1);
    run.checkpoints()?;
    run.load_state(1)?;
    Ok(())
}

/// A cache of quantised weights: one that is damaged is written anew.
pub fn nf4_cache(folder: &Path, bytes: &[u8]) -> Result<()> {
    let model = fixtures().join("tiny-granite");
    let Some(config) = hugging_face::read_config(&model)? else {
        anyhow::bail!("the fixture has no configuration")
    };
    let cache = folder.join("base");
    fs::create_dir_all(&cache)?;
    fs::write(cache.join("manifest.json"), bytes)?;
    fs::write(cache.join("nf4.safetensors"), bytes)?;
    let tensors = Nf4Cache::new(Box::new(FolderTensors::open(&model)?), &config, "base", folder);
    tensors.nf4("model.layers.0.self_attn.q_proj.weight", Device::Cpu)?;
    Ok(())
}
