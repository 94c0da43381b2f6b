//! Answers to the dataset's held-out examples: exact match and ROUGE-L against the supervised response.
//!
//! Prompt and response are taken as tokens from the packed rows, so what is asked is exactly what training would
//! have shown. Of a conversation the last response is asked for; a response that fills its context is passed over.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};

use crate::data::store::{Dataset, Split};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::user_error;
use crate::eval::rouge::{rouge_l, same_text};
use crate::eval::task::{Judgement, Prompt, Question, Task, Verdict, spread};
use crate::model::batch::Sequence;
use crate::recipe::HeldOutSpec;

/// An example of the dataset.
#[derive(Debug, Clone)]
struct Held {
    id: String,
    source: String,
    prompt: Vec<u32>,
    text: String,
    response: String,
}

/// The task.
#[derive(Debug)]
pub struct HeldOut {
    examples: Vec<Held>,
    max_tokens: usize,
}

impl HeldOut {
    /// Takes the examples out of the validation rows.
    ///
    /// # Errors
    /// When the dataset is damaged, or a source is not among its own.
    pub fn open(
        spec: &HeldOutSpec,
        limit: Option<usize>,
        dataset: &Dataset,
        tokenizer: &ChatTokenizer,
    ) -> Result<Self> {
        let names = dataset.source_names();
        if let Some(unknown) = spec.sources.iter().find(|one| !names.contains(&one.as_str())) {
            return Err(user_error(
                format!("`eval.held_out.sources` names `{unknown}`, the dataset has {}", names.join(", ")),
                "name sources of the dataset",
            ));
        }
        let mut by_source: BTreeMap<u16, Vec<Held>> = BTreeMap::new();
        for row in dataset.rows(Split::Validation)? {
            for (sequence, example) in row.sequences.iter().zip(&row.examples) {
                let name =
                    names.get(usize::from(sequence.source)).copied().context("a sequence of no source")?;
                if spec.sources.is_empty() || spec.sources.iter().any(|one| one == name) {
                    let held = held(sequence, *example, name, tokenizer)?;
                    by_source.entry(sequence.source).or_default().extend(held);
                }
            }
        }
        let limit = limit.or(spec.limit);
        let examples = by_source.values().flat_map(|all| spread(all, limit)).collect();
        Ok(Self { examples, max_tokens: spec.max_tokens })
    }
}

fn held(sequence: &Sequence, example: u32, source: &str, tokenizer: &ChatTokenizer) -> Result<Option<Held>> {
    let Some((prompt, response)) = last_response(sequence) else { return Ok(None) };
    let ends = |id: &u32| tokenizer.eos_token_ids().contains(id);
    let response: Vec<u32> = response.iter().copied().take_while(|id| !ends(id)).collect();
    Ok(Some(Held {
        id: format!("{source}#{example}"),
        source: source.to_string(),
        text: tokenizer.decode(prompt, true)?,
        response: tokenizer.decode(&response, true)?.trim().to_string(),
        prompt: prompt.to_vec(),
    }))
}

/// What stands before the last supervised run, and that run.
fn last_response(sequence: &Sequence) -> Option<(&[u32], &[u32])> {
    let mask = &sequence.loss_mask;
    let end = mask.iter().rposition(|supervised| *supervised)? + 1;
    let start = mask[..end].iter().rposition(|supervised| !supervised)? + 1;
    Some((sequence.input_ids.get(..start)?, sequence.input_ids.get(start..end)?))
}

impl Task for HeldOut {
    fn name(&self) -> &'static str {
        "held_out"
    }

    fn measures(&self) -> &'static [&'static str] {
        &["rouge_l", "exact_match"]
    }

    fn len(&self) -> usize {
        self.examples.len()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    fn question(&self, at: usize) -> Result<Question> {
        let Held { id, source, prompt, text, response } = &self.examples[at];
        Ok(Question {
            id: id.clone(),
            group: source.clone(),
            prompt: Prompt::Tokens(prompt.clone()),
            text: text.clone(),
            reference: response.clone(),
        })
    }

    fn judge(&mut self, at: usize, answer: &str) -> Result<Judgement> {
        let reference = &self.examples[at].response;
        let exact = same_text(reference, answer);
        Ok(Judgement {
            extracted: String::new(),
            verdict: if exact { Verdict::Correct } else { Verdict::Wrong },
            error: None,
            scores: vec![rouge_l(reference, answer), f64::from(u8::from(exact))],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_response_is_asked_for() {
        let of = |mask: &[u8]| {
            let sequence = Sequence {
                input_ids: (0..mask.len() as u32).collect(),
                loss_mask: mask.iter().map(|one| *one == 1).collect(),
                source: 0,
            };
            last_response(&sequence).map(|(prompt, response)| (prompt.to_vec(), response.to_vec()))
        };
        assert_eq!(of(&[0, 0, 1, 1]), Some((vec![0, 1], vec![2, 3])));
        assert_eq!(of(&[0, 1, 0, 1, 1, 0]), Some((vec![0, 1, 2], vec![3, 4])));
        assert_eq!(of(&[0, 0]), None);
        assert_eq!(of(&[1, 1]), None);
        assert_eq!(of(&[]), None);
    }
}
