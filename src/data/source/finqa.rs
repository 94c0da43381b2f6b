//! FinQA (Chen et al. 2021): single questions about the pages of filings that ConvFinQA's conversations were made from.
//!
//! It is measured on, and kept out of what is trained on; no source of the mixture is made of it.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// A record as a conversation of one turn in ConvFinQA's form.
///
/// # Errors
/// When it has no question, program or result.
pub(crate) fn as_conversation(mut record: Value) -> Result<Value> {
    let part = |name: &str| -> Result<Value> {
        let value = record.get("qa").and_then(|qa| qa.get(name));
        value.cloned().with_context(|| format!("not a record of FinQA: it has no `qa.{name}`"))
    };
    let annotation = json!({
        "dialogue_break": [part("question")?],
        "turn_program": [part("program")?],
        "exe_ans_list": [part("exe_ans")?],
    });
    record.as_object_mut().context("not a record of FinQA")?.insert("annotation".to_string(), annotation);
    Ok(record)
}
