//! FinQA and ConvFinQA (Chen et al. 2021, 2022): execution accuracy of programs over a page of a financial report.
//!
//! An answer may be a program, which is executed, or the number itself. In ConvFinQA every turn is a question of
//! its own; the turns before it are given with their references.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use serde_json::{Map, Value};

use crate::data::example::{Message, Role};
use crate::data::reader::read_records;
use crate::data::source::{Reason, convfinqa, finqa};
use crate::eval::finance_program::{self, Outcome};
use crate::eval::number;
use crate::eval::task::{Judgement, Prompt, Question, Task, spread};
use crate::recipe::FinanceTaskSpec;

/// What stands before the number in the references of `program_then_answer`.
const ANSWER: &str = "Answer:";

/// A turn of a conversation, or a single question.
#[derive(Debug, Clone)]
struct Turn {
    id: String,
    messages: Vec<Message>,
    reference: String,
    gold: Gold,
    /// Rows of cells, the first of each its name.
    table: Vec<Vec<String>>,
}

/// What is right.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Gold {
    Number(f64),
    Yes(bool),
}

/// The task, of either set.
#[derive(Debug)]
pub struct Finance {
    name: &'static str,
    turns: Vec<Turn>,
    unusable: usize,
    max_tokens: usize,
}

impl Finance {
    /// Reads ConvFinQA's conversations, of any form in circulation.
    ///
    /// # Errors
    /// When the file is missing or of another form.
    pub fn conversations(spec: &FinanceTaskSpec, limit: Option<usize>) -> Result<Self> {
        Self::read("convfinqa", spec, limit, Ok)
    }

    /// Reads FinQA's questions.
    ///
    /// # Errors
    /// When the file is missing or of another form.
    pub fn questions(spec: &FinanceTaskSpec, limit: Option<usize>) -> Result<Self> {
        Self::read("finqa", spec, limit, finqa::as_conversation)
    }

    fn read(
        name: &'static str,
        spec: &FinanceTaskSpec,
        limit: Option<usize>,
        form: impl Fn(Value) -> Result<Value>,
    ) -> Result<Self> {
        let (mut turns, mut unusable) = (Vec::new(), 0);
        read_records::<Value>(&spec.path, &["dev.json", "test.json"], &["dev"], &mut |number, record| {
            let record = form(record)?;
            let table = table_of(&record);
            let id = record.get("id").and_then(Value::as_str).unwrap_or_default().to_string();
            match convfinqa::conversation(number, record, spec.target)? {
                Ok(example) => turns.extend(turns_of(&id, &example.messages, &table)?),
                // A later record holds the whole conversation.
                Err(Reason::EarlierTurn) => {}
                Err(_) => unusable += 1,
            }
            Ok(())
        })?;
        let turns = spread(&turns, limit.or(spec.limit));
        Ok(Self { name, turns, unusable, max_tokens: spec.max_tokens })
    }
}

/// The question of each turn, behind the turns before it.
fn turns_of(id: &str, messages: &[Message], table: &[Vec<String>]) -> Result<Vec<Turn>> {
    let replies = messages.iter().enumerate().filter(|(_, message)| message.role == Role::Assistant);
    replies
        .enumerate()
        .map(|(turn, (at, reply))| {
            let said = reply.content.rsplit_once(ANSWER).map_or(reply.content.as_str(), |(_, said)| said);
            let gold = Gold::of(said).ok_or_else(|| anyhow!("`{said}` is neither a number nor yes or no"))?;
            Ok(Turn {
                id: format!("{id}#{}", turn + 1),
                messages: messages[..at].to_vec(),
                reference: reply.content.clone(),
                gold,
                table: table.to_vec(),
            })
        })
        .collect()
}

/// The table as rows: upstream's own, or the repackaging's columns of named rows.
fn table_of(record: &Value) -> Vec<Vec<String>> {
    if let Some(rows) = record.get("table").and_then(Value::as_array) {
        let row = |row: &Value| row.as_array().map(|cells| cells.iter().map(text_of).collect());
        return rows.iter().filter_map(row).collect();
    }
    let columns = record.get("doc").and_then(|doc| doc.get("table")).and_then(Value::as_object);
    columns.map(rows_of_columns).unwrap_or_default()
}

fn rows_of_columns(columns: &Map<String, Value>) -> Vec<Vec<String>> {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (name, cell) in columns.values().filter_map(Value::as_object).flatten() {
        match rows.iter_mut().find(|row| row.first() == Some(name)) {
            Some(row) => row.push(text_of(cell)),
            None => rows.push(vec![name.clone(), text_of(cell)]),
        }
    }
    rows
}

fn text_of(cell: &Value) -> String {
    cell.as_str().map_or_else(|| cell.to_string(), str::to_string)
}

impl Gold {
    fn of(text: &str) -> Option<Self> {
        match text.trim() {
            "yes" => Some(Self::Yes(true)),
            "no" => Some(Self::Yes(false)),
            number => number.parse().ok().map(|number| Self::Number(finance_program::rounded(number))),
        }
    }

    fn is(self, outcome: Outcome) -> bool {
        match (self, outcome) {
            (Self::Number(gold), Outcome::Number(number)) => gold == number,
            (Self::Yes(gold), Outcome::Yes(yes)) => gold == yes,
            _ => false,
        }
    }
}

/// What of an answer is judged: the first line that begins a program; else what is said to be the answer; else
/// a yes or no at its beginning, or its last number.
fn said(answer: &str) -> String {
    if let Some(program) = answer.lines().find(|line| finance_program::begins(line)) {
        return program.trim().trim_end_matches('.').to_string();
    }
    let stated = answer.rsplit_once(ANSWER).map_or(answer, |(_, stated)| stated).trim();
    let first = stated.split(|letter: char| !letter.is_ascii_alphabetic()).next().unwrap_or_default();
    match first.to_ascii_lowercase().as_str() {
        word @ ("yes" | "no") => word.to_string(),
        _ => last_number(stated).unwrap_or_default(),
    }
}

/// The last number as written, with its percent sign.
fn last_number(text: &str) -> Option<String> {
    let place = number::places(text).pop()?;
    let percent = text[place.end..].trim_start().starts_with('%');
    Some(format!("{}{}", &text[place], if percent { "%" } else { "" }))
}

fn outcome(said: &str, table: &[Vec<String>]) -> Result<Outcome, String> {
    match said {
        "" => Err("there is neither a program nor a number in the answer".to_string()),
        "yes" => Ok(Outcome::Yes(true)),
        "no" => Ok(Outcome::Yes(false)),
        program => finance_program::execute(program, table).map_err(|error| error.to_string()),
    }
}

impl Task for Finance {
    fn name(&self) -> &'static str {
        self.name
    }

    fn measures(&self) -> &'static [&'static str] {
        &["execution_accuracy"]
    }

    fn len(&self) -> usize {
        self.turns.len()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    fn question(&self, at: usize) -> Result<Question> {
        let Turn { id, messages, reference, .. } = &self.turns[at];
        let asked = messages.last().map_or("", |message| message.content.as_str());
        let text = asked.rsplit_once("Question: ").map_or(asked, |(_, question)| question).to_string();
        Ok(Question {
            id: id.clone(),
            group: String::new(),
            prompt: Prompt::Chat(messages.clone()),
            text,
            reference: reference.clone(),
        })
    }

    fn judge(&mut self, at: usize, answer: &str) -> Result<Judgement> {
        let Turn { gold, table, .. } = &self.turns[at];
        let said = said(answer);
        Ok(match outcome(&said, table) {
            Ok(outcome) => Judgement::of(said, gold.is(outcome)),
            Err(error) => Judgement::failed(said, error),
        })
    }

    fn left_out(&self) -> BTreeMap<String, usize> {
        [("conversations that cannot be used".to_string(), self.unusable)].into()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_program_is_judged_and_else_the_number() {
        for (answer, expected) in [
            ("subtract(1, 2), divide(#0, 2)\nAnswer: -0.5", "subtract(1, 2), divide(#0, 2)"),
            ("  add(1, 2).", "add(1, 2)"),
            ("206588\nAnswer: 206588", "206588"),
            ("Answer: 14.1 %", "14.1%"),
            ("It went from 3 to -5.", "-5"),
            ("Yes, it is.", "yes"),
            ("greater: no\nAnswer: no", "no"),
            ("nothing", ""),
            ("", ""),
        ] {
            assert_eq!(said(answer), expected, "{answer:?}");
        }
    }

    #[test]
    fn results_are_compared_exactly_after_rounding() {
        let is = |gold: &str, said: &str| {
            Gold::of(gold).is_some_and(|gold| outcome(said, &[]).is_ok_and(|one| gold.is(one)))
        };
        assert!(is("-0.13228", "subtract(164, 189), divide(#0, 189)"));
        assert!(is("0.141", "14.1%") && is("164", "164") && is("yes", "greater(2, 1)"));
        assert!(!is("-0.13228", "-0.1323") && !is("1", "greater(2, 1)") && !is("no", "greater(2, 1)"));
        assert!(!is("x", "1"));
    }

    #[test]
    fn columns_of_named_rows_become_rows() {
        let record = json!({"doc": {"table": {"2014": {"sales": 5.0, "costs": 1}, "2013": {"sales": 4.5}}}});
        assert_eq!(table_of(&record), [vec!["sales", "5.0", "4.5"], vec!["costs", "1"]]);
        let record = json!({"table": [["", "2014"], ["sales", "5"]]});
        assert_eq!(table_of(&record), [["", "2014"], ["sales", "5"]]);
        assert_eq!(table_of(&json!({})), Vec::<Vec<String>>::new());
    }
}
