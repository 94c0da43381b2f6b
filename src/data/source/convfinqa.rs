//! ConvFinQA: conversations over a page of a financial report, one example each, every answer supervised.
//!
//! Upstream has files of conversations and files of turns. A record of the latter holds the whole conversation too, and
//! says how far it has come, so the conversation is taken once, from its last turn. Of the re-packagings, one spells the
//! table as columns of numbers; the other has the table as text, questions, and the answer to the last of them.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, anyhow};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Outcome, Reason, Source, folded};
use crate::data::example::{Cut, Edge, Example, Message, Role};
use crate::error::user_error;
use crate::recipe::ConvFinQaTarget;

/// Names of the file in an archive.
pub const MEMBERS: &[&str] = &["train.json"];

/// What stands before a question behind a page.
const QUESTION: &str = "Question: ";

/// A record of any form in circulation.
#[derive(Debug, Deserialize)]
pub(super) struct Record {
    id: Option<String>,
    filename: Option<String>,
    // Upstream, and the flattened re-packaging.
    pre_text: Option<Text>,
    post_text: Option<Text>,
    table: Option<Table>,
    annotation: Option<Annotation>,
    // The re-packaging with `{"dev": […]}`.
    doc: Option<Document>,
    dialogue: Option<Dialogue>,
    // The flattened one.
    questions: Option<Vec<String>>,
    program: Option<String>,
    answer: Option<Value>,
}

/// Sentences, or the text that they make.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected text or a list of sentences")]
enum Text {
    Sentences(Vec<String>),
    Whole(String),
}

impl Text {
    fn join(self) -> String {
        match self {
            Self::Sentences(sentences) => sentences.join(" "),
            Self::Whole(text) => text.trim().to_string(),
        }
    }
}

/// Rows of cells, or a table that is spelt out.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected rows of cells or text")]
enum Table {
    Rows(Vec<Vec<String>>),
    Text(String),
}

impl Table {
    fn spelt(&self) -> String {
        match self {
            Self::Rows(rows) => table_of_rows(rows),
            Self::Text(text) => text.trim().to_string(),
        }
    }
}

/// The conversation as upstream has it; `qa` or `qa_0` and `qa_1` beside it say the same of the last turns.
#[derive(Debug, Deserialize)]
struct Annotation {
    dialogue_break: Vec<String>,
    turn_program: Vec<String>,
    #[serde(default)]
    exe_ans_list: Vec<Value>,
    /// In a file of turns: the questions up to this one.
    cur_dial: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct Document {
    #[serde(default)]
    pre_text: String,
    #[serde(default)]
    post_text: String,
    /// Column to row to number.
    table: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct Dialogue {
    conv_questions: Vec<String>,
    turn_program: Vec<String>,
    executed_answers: Vec<Value>,
}

/// What all forms say.
struct Page {
    before: String,
    table: String,
    after: String,
    questions: Vec<String>,
    /// As many as answers, or none.
    programs: Vec<String>,
    /// To the last questions: to all of them, but in the flattened form.
    answers: Vec<Value>,
}

/// The source.
pub(super) struct ConvFinQa {
    pub target: ConvFinQaTarget,
}

/// The example of a record of either form, whatever it will be used for.
///
/// # Errors
/// When the record is of neither form.
pub(in crate::data) fn conversation_of(number: u32, record: Value) -> Result<Outcome> {
    let record = serde_json::from_value(record).context("not a conversation of ConvFinQA")?;
    ConvFinQa { target: ConvFinQaTarget::Answer }.example(number, record)
}

/// The example of a record of either form, as training with this target says it: evaluation asks the same.
///
/// # Errors
/// When the record is of neither form.
pub(crate) fn conversation(number: u32, record: Value, target: ConvFinQaTarget) -> Result<Outcome> {
    let record = serde_json::from_value(record).context("not a conversation of ConvFinQA")?;
    ConvFinQa { target }.example(number, record)
}

impl Source for ConvFinQa {
    type Record = Record;

    fn example(&self, number: u32, record: Record) -> Result<Outcome> {
        if record.is_earlier_turn() {
            return Ok(Err(Reason::EarlierTurn));
        }
        let document = document_of(&record);
        let (name, is_flat) = (record.name(), record.questions.is_some());
        let page = record.page()?;
        let turns = page.questions.len();
        if turns == 0 {
            return Ok(Err(Reason::EmptyQuestion));
        }
        if page.programs.is_empty() && is_flat && self.target == ConvFinQaTarget::ProgramThenAnswer {
            return Err(user_error(
                format!("conversation `{name}` has no program: the flattened form has answers only"),
                "set `data.sources.convfinqa.target` to `answer`, or name the upstream `train.json`",
            ));
        }
        let are_whole = if is_flat {
            page.answers.len() == 1 && page.programs.len() <= 1
        } else {
            page.programs.len() == turns && page.answers.len() == turns
        };
        if !are_whole {
            return Ok(Err(Reason::TurnsDisagree));
        }
        Ok(self.conversation(number, document, &page))
    }
}

impl ConvFinQa {
    fn conversation(&self, record: u32, document: String, page: &Page) -> Outcome {
        let (mut first, cuts) = self.opening(page);
        let questions: Vec<&str> = page.questions.iter().map(|question| question.trim()).collect();
        if questions.iter().any(|question| question.is_empty()) {
            return Err(Reason::EmptyQuestion);
        }
        // Questions without answers of their own are what the first answered one refers to.
        let (unanswered, questions) = questions.split_at(questions.len() - page.answers.len());
        if !unanswered.is_empty() {
            let at = first.len() - QUESTION.len();
            first.insert_str(at, &format!("Asked before: {}\n\n", unanswered.join(" ")));
        }
        let mut messages = Vec::with_capacity(2 * questions.len());
        for (at, (question, answer)) in questions.iter().zip(&page.answers).enumerate() {
            let answer = answer_text(answer);
            let program = page.programs.get(at).map(|program| program.trim());
            if answer.is_empty() || program == Some("") {
                return Err(Reason::EmptyResponse);
            }
            let asked = if at == 0 { format!("{first}{question}") } else { (*question).to_string() };
            messages.push(Message::new(Role::User, asked));
            messages.push(Message::new(Role::Assistant, self.response(program, &answer)));
        }
        let asked = questions.first().map_or(0, |question| question.len());
        let question = messages.first().map_or(0..0, |one| one.content.len() - asked..one.content.len());
        Ok(Example { messages, document, file: 0, record, question, cuts })
    }

    fn response(&self, program: Option<&str>, answer: &str) -> String {
        match (self.target, program) {
            (ConvFinQaTarget::ProgramThenAnswer, Some(program)) => format!("{program}\nAnswer: {answer}"),
            _ => answer.to_string(),
        }
    }

    /// The page, up to the first question; and what of it may go: first the end of what follows the table,
    /// then the beginning of what precedes it.
    fn opening(&self, page: &Page) -> (String, Vec<Cut>) {
        let mut text = match self.target {
            ConvFinQaTarget::ProgramThenAnswer => {
                "Answer the questions about this page of a financial report: the program that computes each answer, then the answer.\n\n"
            }
            ConvFinQaTarget::Answer => "Answer the questions about this page of a financial report.\n\n",
        }
        .to_string();
        let mut cuts = Vec::new();
        for (part, edge) in
            [(&page.before, Some(Edge::Head)), (&page.table, None), (&page.after, Some(Edge::Tail))]
        {
            if part.is_empty() {
                continue;
            }
            let start = text.len();
            text.push_str(part);
            if let Some(edge) = edge {
                cuts.insert(0, Cut { message: 0, bytes: start..text.len(), edge });
            }
            text.push_str("\n\n");
        }
        text.push_str(QUESTION);
        (text, cuts)
    }
}

/// The page of the filing: several conversations are about the same one.
fn document_of(record: &Record) -> String {
    if let Some(filename) = record.filename.as_deref().filter(|name| !name.is_empty()) {
        return filename.to_string();
    }
    // `Single_MRO/2007/page_134.pdf-1` is the first question on `MRO/2007/page_134.pdf`.
    let Some(id) = record.id.as_deref() else {
        // A page without a name is known by what it says.
        let said = record.table.as_ref().map(Table::spelt).unwrap_or_default();
        return folded(&said);
    };
    let id = id.strip_prefix("Single_").or_else(|| id.strip_prefix("Double_")).unwrap_or(id);
    match id.rsplit_once(".pdf") {
        Some((page, _)) => format!("{page}.pdf"),
        None => id.to_string(),
    }
}

impl Record {
    /// As errors name it.
    fn name(&self) -> String {
        self.id.clone().or_else(|| self.filename.clone()).unwrap_or_default()
    }

    /// Whether it is a turn that another one follows, whose record holds this one too.
    fn is_earlier_turn(&self) -> bool {
        let annotation = self.annotation.as_ref();
        annotation.is_some_and(|one| {
            one.cur_dial.as_ref().is_some_and(|so_far| so_far.len() < one.dialogue_break.len())
        })
    }

    fn page(self) -> Result<Page> {
        let name = self.name();
        let missing = |field| anyhow!("conversation `{name}` has no `{field}`");
        match (self.annotation, self.dialogue, self.questions) {
            (Some(annotation), _, _) => {
                if annotation.exe_ans_list.is_empty() {
                    return Err(user_error(
                        format!("conversation `{name}` has no `annotation.exe_ans_list`: no answers"),
                        "name `train.json`; the private test file has questions only",
                    ));
                }
                Ok(Page {
                    before: self.pre_text.ok_or_else(|| missing("pre_text"))?.join(),
                    table: self.table.ok_or_else(|| missing("table"))?.spelt(),
                    after: self.post_text.ok_or_else(|| missing("post_text"))?.join(),
                    questions: annotation.dialogue_break,
                    programs: annotation.turn_program,
                    answers: annotation.exe_ans_list,
                })
            }
            (None, Some(dialogue), _) => {
                let document = self.doc.ok_or_else(|| missing("doc"))?;
                Ok(Page {
                    before: document.pre_text.trim().to_string(),
                    table: table_of_columns(&document.table),
                    after: document.post_text.trim().to_string(),
                    questions: dialogue.conv_questions,
                    programs: dialogue.turn_program,
                    answers: dialogue.executed_answers,
                })
            }
            (None, None, Some(questions)) => Ok(Page {
                before: self.pre_text.map(Text::join).unwrap_or_default(),
                table: self.table.ok_or_else(|| missing("table"))?.spelt(),
                after: self.post_text.map(Text::join).unwrap_or_default(),
                questions,
                programs: self.program.into_iter().collect(),
                answers: vec![self.answer.ok_or_else(|| missing("answer"))?],
            }),
            (None, None, None) => Err(user_error(
                format!(
                    "conversation `{name}` has neither `annotation` (upstream), `dialogue`, nor `questions`"
                ),
                "name `train.json` of the upstream `data.zip`",
            )),
        }
    }
}

/// A number without a needless fraction; `yes` and `no` as they are.
fn answer_text(answer: &Value) -> String {
    match answer {
        Value::Number(number) => number.as_f64().map_or_else(|| number.to_string(), number_text),
        Value::String(text) => text.trim().to_string(),
        Value::Bool(true) => "yes".to_string(),
        Value::Bool(false) => "no".to_string(),
        _ => String::new(),
    }
}

fn number_text(number: f64) -> String {
    // The shortest digits that mean this number; -0 is 0 to a reader.
    if number == 0.0 { "0".to_string() } else { number.to_string() }
}

/// Rows of cells, the first of them the header, as a Markdown table.
fn table_of_rows(rows: &[Vec<String>]) -> String {
    let width = rows.iter().map(Vec::len).max().unwrap_or(0);
    if width == 0 {
        return String::new();
    }
    let mut text = String::new();
    for (at, row) in rows.iter().enumerate() {
        let cells = row.iter().map(String::as_str).chain(std::iter::repeat("")).take(width);
        let cells: Vec<String> = cells.map(cell_text).collect();
        // Writing into a String cannot fail.
        let _ = writeln!(text, "| {} |", cells.join(" | "));
        if at == 0 {
            let _ = writeln!(text, "|{}", " --- |".repeat(width));
        }
    }
    text.trim_end().to_string()
}

fn cell_text(cell: &str) -> String {
    cell.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// Columns of named rows as a Markdown table, rows in the order of their first appearance.
fn table_of_columns(columns: &Map<String, Value>) -> String {
    let mut names: Vec<&String> = Vec::new();
    for column in columns.values().filter_map(Value::as_object) {
        for name in column.keys() {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let header = std::iter::once(String::new()).chain(columns.keys().cloned()).collect();
    let body = names.iter().map(|name| {
        let cells = columns.values().map(|column| column.get(name.as_str()).map(answer_text));
        std::iter::once((*name).clone()).chain(cells.map(Option::unwrap_or_default)).collect()
    });
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(body).collect();
    if names.is_empty() { String::new() } else { table_of_rows(&rows) }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use serde_json::json;

    use super::*;

    fn upstream() -> Value {
        json!({
            "id": "Single_ABC/2014/page_9.pdf-2", "filename": "ABC/2014/page_9.pdf",
            "pre_text": ["first .", "second ."], "post_text": ["after ."], "table_ori": [],
            "table": [["", "2014"], ["sales | net", "5"], ["short"]],
            "qa": {"question": "q"},
            "annotation": {
                "amt_table": "<table/>", "qa_split": [0, 0],
                "dialogue_break": ["what was it?", "is that more?"],
                "turn_program": ["subtract(5, 0.5)", "greater(5, 4)"],
                "exe_ans_list": [4.0, "yes"]
            }
        })
    }

    fn outcome(record: Value, target: ConvFinQaTarget) -> Result<Outcome> {
        ConvFinQa { target }.example(1, serde_json::from_value(record)?)
    }

    fn example(record: Value, target: ConvFinQaTarget) -> Example {
        outcome(record, target).unwrap().unwrap()
    }

    #[test]
    fn a_conversation_is_one_example_with_the_page_in_its_first_turn() {
        let found = example(upstream(), ConvFinQaTarget::ProgramThenAnswer);
        let said: Vec<&str> = found.messages.iter().map(|message| message.content.as_str()).collect();
        assert_eq!(
            said[0],
            "Answer the questions about this page of a financial report: the program that computes each answer, then the answer.\n\n\
             first . second .\n\n|  | 2014 |\n| --- | --- |\n| sales \\| net | 5 |\n| short |  |\n\nafter .\n\nQuestion: what was it?"
        );
        assert_eq!(said[1..], ["subtract(5, 0.5)\nAnswer: 4", "is that more?", "greater(5, 4)\nAnswer: yes"]);
        assert_eq!(found.document, "ABC/2014/page_9.pdf");
    }

    #[test]
    fn what_follows_the_table_goes_first_then_the_beginning_never_the_table() {
        let found = example(upstream(), ConvFinQaTarget::Answer);
        let cut = |at: usize| (&found.messages[0].content[found.cuts[at].bytes.clone()], found.cuts[at].edge);
        assert_eq!(found.cuts.len(), 2);
        assert_eq!(cut(0), ("after .", Edge::Tail));
        assert_eq!(cut(1), ("first . second .", Edge::Head));
        assert_eq!(found.messages[1].content, "4");
    }

    #[test]
    fn the_repackaging_says_the_same() {
        let record = json!({
            "id": "Double_ABC/2014/page_9.pdf",
            "doc": {"pre_text": "first .", "post_text": "", "table": {"2014": {"sales": 5.0}, "2013": {"sales": 4.5, "costs": 1}}},
            "dialogue": {"conv_questions": ["q"], "conv_answers": ["5"], "turn_program": ["5"], "executed_answers": [5.0], "qa_split": [false]},
            "features": {}
        });
        let found = example(record, ConvFinQaTarget::Answer);
        assert!(found.messages[0].content.contains(
            "first .\n\n|  | 2014 | 2013 |\n| --- | --- | --- |\n| sales | 5 | 4.5 |\n| costs |  | 1 |\n\nQuestion: q"
        ));
        assert_eq!(found.document, "ABC/2014/page_9.pdf");
    }

    #[test]
    fn numbers_are_spelt_as_people_write_them() {
        let text = |value| answer_text(&value);
        assert_eq!(text(json!(164.0)), "164");
        assert_eq!(text(json!(-0.13228)), "-0.13228");
        assert_eq!(text(json!(1e-5)), "0.00001");
        assert_eq!(text(json!(16923076.92308)), "16923076.92308");
        assert_eq!(text(json!(-0.0)), "0");
        assert_eq!(text(json!(" no ")), "no");
        assert_eq!(text(json!(null)), "");
    }

    #[test]
    fn odd_conversations_are_dropped_or_told() {
        let mut record = upstream();
        record["annotation"]["turn_program"] = json!(["1"]);
        assert_eq!(outcome(record, ConvFinQaTarget::Answer).unwrap(), Err(Reason::TurnsDisagree));
        let mut record = upstream();
        record["annotation"]["exe_ans_list"] = json!([1.0, null]);
        assert_eq!(outcome(record, ConvFinQaTarget::Answer).unwrap(), Err(Reason::EmptyResponse));
        let mut record = upstream();
        record["annotation"]["exe_ans_list"] = json!([]);
        let text = crate::error::render(&outcome(record, ConvFinQaTarget::Answer).unwrap_err());
        assert!(text.contains("no answers") && text.contains("private test file"), "{text}");
        let text = crate::error::render(&outcome(json!({"id": "x"}), ConvFinQaTarget::Answer).unwrap_err());
        assert!(text.contains("neither `annotation`"), "{text}");
    }

    #[test]
    fn of_a_file_of_turns_the_last_one_gives_the_conversation() {
        let turn = |at: usize| {
            let mut record = upstream();
            record["id"] = json!(format!("Single_ABC/2014/page_9.pdf-2_{at}"));
            let annotation = &mut record["annotation"];
            annotation["cur_dial"] = json!(["what was it?", "is that more?"][..=at]);
            annotation["cur_program"] = json!(["subtract(5, 0.5)", "greater(5, 4)"][at]);
            annotation["exe_ans"] = annotation["exe_ans_list"][at].clone();
            annotation["turn_ind"] = json!(at);
            record
        };
        assert_eq!(outcome(turn(0), ConvFinQaTarget::Answer).unwrap(), Err(Reason::EarlierTurn));
        let whole = example(upstream(), ConvFinQaTarget::ProgramThenAnswer);
        assert_eq!(example(turn(1), ConvFinQaTarget::ProgramThenAnswer), whole);
    }

    #[test]
    fn the_flattened_form_answers_its_last_question() {
        let record = json!({"pre_text": "first .", "post_text": ["after ."], "table": " a | b ", "id": "ABC/2014/page_9.pdf",
            "questions": ["what was it?", "is that more?"], "answer": 4.5});
        let found = example(record.clone(), ConvFinQaTarget::Answer);
        assert_eq!(
            found.messages[0].content,
            "Answer the questions about this page of a financial report.\n\nfirst .\n\na | b\n\nafter .\n\n\
             Asked before: what was it?\n\nQuestion: is that more?"
        );
        assert_eq!((found.messages.len(), found.messages[1].content.as_str()), (2, "4.5"));
        assert_eq!(&found.messages[0].content[found.question.clone()], "is that more?");
        assert_eq!(found.document, "ABC/2014/page_9.pdf");
        let text = crate::error::render(&outcome(record, ConvFinQaTarget::ProgramThenAnswer).unwrap_err());
        assert!(text.contains("has no program") && text.contains("to `answer`"), "{text}");
    }
}
