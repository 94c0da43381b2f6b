//! Where the real data lies, and Granite's tokenizer.

use std::path::PathBuf;

use granite::data::tokenizer::TokenizerFiles;
use serde_json::Value;

/// The folder of real dumps and tokenizers, or nothing after saying so.
pub fn real_data(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("GRANITE_TEST_DATA").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: {test}: `GRANITE_TEST_DATA` is not set");
    }
    folder
}

/// Granite 3.1's tokenizer and chat template.
pub fn granite_tokenizer(data: &std::path::Path) -> TokenizerFiles {
    let folder = data.join("granite/tokenizer");
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.join("tokenizer_config.json")).unwrap()).unwrap();
    let text = |key: &str| config[key].as_str().map(str::to_string);
    TokenizerFiles {
        tokenizer_json: std::fs::read(folder.join("tokenizer.json")).unwrap(),
        chat_template: text("chat_template"),
        bos_token: text("bos_token"),
        eos_token: text("eos_token"),
        pad_token: text("pad_token"),
        eos_token_ids: vec![0],
    }
}
