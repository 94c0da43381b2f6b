//! Examples that an evaluation set holds: to train on them is to measure memory.
//!
//! An example is contaminated when it asks what an item asks, word for word; when thirteen words in a row of an item's
//! question stand in it; or when it holds most of an item's response by the same measure. Only question and response are
//! compared. A question to a database asks nothing without its schema, so there the response must agree too; of a
//! conversation about a filing, the page decides, or the same question with the same table.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use anyhow::{Context as _, Result};
use rayon::prelude::*;
use serde_json::Value;

use super::example::Example;
use super::manifest::InputFile;
use super::reader::{fingerprint, read_records};
use super::source::{convfinqa, finqa};
use super::words::{Words, similarity};
use crate::error::user_error;
use crate::recipe::ContaminationSpec;

/// Share of two tables' numbers that are the same when the tables are: re-packagings spell headers differently.
const SAME_TABLE: f64 = 0.9;
/// A table of fewer numbers may be another one with the same few.
const TABLE_NUMBERS: usize = 4;

/// An item of an evaluation set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The file's name.
    pub set: String,
    /// Its own name, or the record's number.
    pub name: String,
    /// What it asks.
    pub question: String,
    /// What it expects.
    pub response: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// The question says all there is to know.
    Whole,
    /// The question is about a database that is shown beside it.
    Database,
    /// The questions are about a page of a filing.
    Filing { page: String, table: Vec<u64>, questions: Vec<u64> },
}

/// How an example was found to be contaminated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum How {
    /// It asks the same, word for word.
    SameQuestion,
    /// So many words in a row of the item's question stand in it.
    SharedRun(usize),
    /// It holds this share of the item's response.
    SharedResponse(f64),
    /// It is about the same page of a filing.
    SamePage,
    /// It asks the same about the same table.
    SameTable,
}

impl How {
    /// For reports.
    pub fn describe(self) -> String {
        match self {
            Self::SameQuestion => "the same question".to_string(),
            Self::SharedRun(words) => format!("{words} words in a row of the question"),
            Self::SharedResponse(share) => format!("{:.0} % of the response", 100.0 * share),
            Self::SamePage => "the same page of a filing".to_string(),
            Self::SameTable => "the same question about the same table".to_string(),
        }
    }
}

/// The items of all evaluation sets, indexed.
#[derive(Debug, Default)]
pub struct EvaluationSets {
    /// Every item.
    pub items: Vec<Item>,
    /// The files that were read.
    pub inputs: Vec<InputFile>,
    questions: HashMap<u64, Vec<u32>>,
    question_runs: HashMap<u64, u32>,
    response_runs: HashMap<u64, Vec<u32>>,
    /// Runs of each item's response.
    response_sizes: Vec<usize>,
    responses: Vec<u64>,
    pages: HashMap<String, u32>,
    tables: HashMap<u64, Vec<u32>>,
}

impl EvaluationSets {
    /// Reads the sets that a recipe names.
    ///
    /// # Errors
    /// When a file cannot be read or is of no known set: the error names file and record.
    pub fn read(spec: &ContaminationSpec) -> Result<Self> {
        let mut sets = Self::default();
        for path in &spec.against {
            sets.read_one(path).context("in `data.contamination.against`")?;
        }
        sets.index(spec.ngram);
        Ok(sets)
    }

    fn read_one(&mut self, path: &Path) -> Result<()> {
        let set = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let before = self.items.len();
        read_records::<Value>(
            path,
            &["dev.json", "test.json"],
            &["dev", "test", "data"],
            &mut |number, record| {
                self.items.push(item(&set, number, record)?);
                Ok(())
            },
        )?;
        if self.items.len() == before {
            return Err(user_error(format!("`{}` holds no record", path.display()), "fetch it again"));
        }
        let found = fingerprint(path)?;
        self.inputs.push(InputFile {
            source: "evaluation set".to_string(),
            path: path.display().to_string(),
            bytes: found.bytes,
            sha256: found.sha256,
        });
        Ok(())
    }

    fn index(&mut self, ngram: usize) {
        for (at, item) in (0..).zip(&self.items) {
            if let Kind::Filing { page, questions, .. } = &item.kind {
                self.pages.entry(page.clone()).or_insert(at);
                for question in questions {
                    self.tables.entry(*question).or_default().push(at);
                }
            }
            let is_filing = matches!(item.kind, Kind::Filing { .. });
            let question = if is_filing { Words::default() } else { Words::of(&item.question) };
            let response = if is_filing { Words::default() } else { Words::of(&item.response) };
            if !question.hashes.is_empty() {
                self.questions.entry(question.whole()).or_default().push(at);
            }
            for run in question.runs(ngram) {
                self.question_runs.entry(run).or_insert(at);
            }
            let runs: HashSet<u64> = response.runs(ngram).collect();
            self.response_sizes.push(runs.len());
            self.responses.push(response.whole());
            for run in runs {
                self.response_runs.entry(run).or_default().push(at);
            }
        }
    }

    /// Which item an example holds, and how; the most telling way first.
    pub fn find(&self, example: &Example, spec: &ContaminationSpec) -> Option<(u32, How)> {
        if self.items.is_empty() {
            return None;
        }
        if let Some(item) = self.pages.get(&example.document) {
            return Some((*item, How::SamePage));
        }
        let (asked, answered) = (example.asked(), example.answered());
        let (question, response) = (Words::of(&asked), Words::of(&answered));
        if let Some(item) = self.same_question(&question, &response) {
            return Some((item, How::SameQuestion));
        }
        let mut runs = question.runs(spec.ngram).chain(response.runs(spec.ngram));
        if let Some(item) = runs.find_map(|run| self.question_runs.get(&run)) {
            return Some((*item, How::SharedRun(spec.ngram)));
        }
        if let Some((item, share)) = self.shared_response(&question, &response, spec) {
            return Some((item, How::SharedResponse(share)));
        }
        self.same_table(example).map(|item| (item, How::SameTable))
    }

    fn same_question(&self, question: &Words, response: &Words) -> Option<u32> {
        let items = self.questions.get(&question.whole())?;
        let agrees = |at: &u32| match self.items.get(*at as usize).map(|item| &item.kind) {
            Some(Kind::Whole) => true,
            Some(Kind::Database) => self.responses.get(*at as usize) == Some(&response.whole()),
            _ => false,
        };
        items.iter().copied().find(agrees)
    }

    fn shared_response(
        &self,
        question: &Words,
        response: &Words,
        spec: &ContaminationSpec,
    ) -> Option<(u32, f64)> {
        let runs: HashSet<u64> = question.runs(spec.ngram).chain(response.runs(spec.ngram)).collect();
        let mut shared: BTreeMap<u32, usize> = BTreeMap::new();
        for item in runs.iter().filter_map(|run| self.response_runs.get(run)).flatten() {
            *shared.entry(*item).or_default() += 1;
        }
        let share = |(item, count): (u32, usize)| {
            let size = *self.response_sizes.get(item as usize)?;
            Some((item, count as f64 / size as f64))
        };
        shared.into_iter().filter_map(share).find(|(_, share)| *share >= spec.response_share)
    }

    fn same_table(&self, example: &Example) -> Option<u32> {
        if self.tables.is_empty() {
            return None;
        }
        let table = table_numbers(example);
        if table.len() < TABLE_NUMBERS {
            return None;
        }
        let has_table = |at: &u32| match self.items.get(*at as usize).map(|item| &item.kind) {
            Some(Kind::Filing { table: other, .. }) => similarity(&table, other) >= SAME_TABLE,
            _ => false,
        };
        questions(example)
            .iter()
            .filter_map(|question| self.tables.get(question))
            .flatten()
            .copied()
            .find(has_table)
    }

    /// What [`EvaluationSets::find`] finds of each example, in order.
    pub fn find_all(&self, examples: &[Example], spec: &ContaminationSpec) -> Vec<Option<(u32, How)>> {
        examples.par_iter().map(|example| self.find(example, spec)).collect()
    }
}

/// Hashes of the questions, turn by turn.
fn questions(example: &Example) -> Vec<u64> {
    example
        .asked()
        .lines()
        .map(Words::of)
        .filter(|words| !words.hashes.is_empty())
        .map(|words| words.whole())
        .collect()
}

/// The numbers of the tables around the question, without sign; sorted, each once.
fn table_numbers(example: &Example) -> Vec<u64> {
    let context = example.context();
    let cells = context
        .lines()
        .filter(|line| line.starts_with('|'))
        .flat_map(|line| line.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == ',')));
    let mut numbers: Vec<u64> =
        cells.filter_map(|cell| cell.replace(',', "").parse::<f64>().ok()).map(f64::to_bits).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

fn item(set: &str, number: u32, record: Value) -> Result<Item> {
    let named = |name: Option<String>, question: String, response: String, kind: Kind| Item {
        set: set.to_string(),
        name: name.unwrap_or_else(|| format!("record {number}")),
        question,
        response,
        kind,
    };
    if record.get("annotation").is_some() || record.get("dialogue").is_some() {
        return filing(number, record, &named);
    }
    // ConvFinQA's records may have `qa` too, beside their annotation.
    if record.get("qa").is_some() {
        return filing(number, finqa::as_conversation(record)?, &named);
    }
    let text = |field: &str| record.get(field).and_then(Value::as_str).map(str::to_string);
    if let (Some(prompt), Some(solution)) = (text("prompt"), text("canonical_solution")) {
        return Ok(named(text("task_id"), docstring(&prompt).to_string(), solution, Kind::Whole));
    }
    if let (Some(question), Some(code)) = (text("prompt").or_else(|| text("text")), text("code")) {
        let name = record.get("task_id").map(|id| format!("task {id}"));
        return Ok(named(name, question, code, Kind::Whole));
    }
    match (text("question"), text("query"), text("answer")) {
        (Some(question), Some(query), _) => Ok(named(None, question, query, Kind::Database)),
        (Some(question), None, Some(answer)) => Ok(named(None, question, answer, Kind::Whole)),
        _ => Err(user_error(
            format!("record {number} is of no evaluation set that is known"),
            "name a file of HumanEval (prompt, canonical_solution), MBPP (prompt, code), GSM8K (question, answer), \
             Spider (question, query), FinQA (qa) or ConvFinQA (annotation, dialogue)",
        )),
    }
}

fn filing(
    number: u32,
    record: Value,
    named: &dyn Fn(Option<String>, String, String, Kind) -> Item,
) -> Result<Item> {
    let example = convfinqa::conversation_of(number, record)?;
    let kind = |example: &Example| Kind::Filing {
        page: example.document.clone(),
        table: table_numbers(example),
        questions: questions(example),
    };
    Ok(match example {
        Ok(example) => {
            named(Some(example.document.clone()), example.asked(), example.answered(), kind(&example))
        }
        // A conversation that cannot be trained on cannot be leaked either.
        Err(_) => named(None, String::new(), String::new(), Kind::Whole),
    })
}

/// What a function's prompt says in words: its last docstring, or all of it.
fn docstring(prompt: &str) -> &str {
    let inside = |mark: &str| {
        let (before, _) = prompt.rsplit_once(mark)?;
        let (_, inside) = before.rsplit_once(mark)?;
        Some(inside)
    };
    inside("\"\"\"").or_else(|| inside("'''")).unwrap_or(prompt)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::example::{Message, Role};

    fn example(context: &str, question: &str, response: &str) -> Example {
        let content = format!("{context}{question}");
        Example {
            question: context.len()..content.len(),
            messages: vec![Message::new(Role::User, content), Message::new(Role::Assistant, response)],
            document: "d".to_string(),
            file: 0,
            record: 1,
            cuts: Vec::new(),
        }
    }

    fn sets(records: &[Value]) -> Result<EvaluationSets> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), serde_json::to_vec(records)?)?;
        let spec =
            ContaminationSpec { against: vec![file.path().to_path_buf()], ..ContaminationSpec::default() };
        EvaluationSets::read(&spec)
    }

    fn how(sets: &EvaluationSets, example: &Example) -> Option<How> {
        sets.find(example, &ContaminationSpec::default()).map(|(_, how)| how)
    }

    const ROBE: &str =
        "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?";

    #[test]
    fn the_same_question_and_a_long_run_of_it_are_found() {
        let sets = sets(&[
            json!({"question": ROBE, "answer": "3"}),
            json!({"prompt": "Reverse a string.", "code": "s[::-1]"}),
        ])
        .unwrap();
        assert_eq!(how(&sets, &example("", "reverse a  String", "other code")), Some(How::SameQuestion));
        let longer = format!("Please help me: {ROBE} Thank you.");
        assert_eq!(how(&sets, &example("", &longer, "4")), Some(How::SharedRun(13)));
        assert_eq!(how(&sets, &example("", &ROBE.replace('2', "3").replace("half", "twice"), "3")), None);
        // Neither a schema nor a passage counts.
        assert_eq!(how(&sets, &example(&longer, "How many?", "3")), None);
    }

    #[test]
    fn a_response_counts_when_most_of_it_is_there() {
        let solution = "    evens = [x for x in numbers if x % 2 == 0]\n    odds = [x for x in numbers if x % 2]\n    return evens + odds";
        let prompt = "def f(numbers):\n    \"\"\" Put the even ones first. \"\"\"\n";
        let sets =
            sets(&[json!({"task_id": "HumanEval/900", "prompt": prompt, "canonical_solution": solution})])
                .unwrap();
        let same = example("", "Sort by parity", &format!("def g(numbers):\n{solution}"));
        assert_eq!(how(&sets, &same), Some(How::SharedResponse(1.0)));
        let some = example("", "Sort by parity", "evens = [x for x in numbers if x % 2 == 0]\nreturn evens");
        assert_eq!(how(&sets, &some), None);
        assert_eq!(how(&sets, &example("", "put the even ones first", "?")), Some(How::SameQuestion));
    }

    #[test]
    fn a_question_to_a_database_needs_its_query_too() {
        let sets = sets(&[
            json!({"question": "How many are there?", "query": "SELECT count(*) FROM a", "db_id": "x"}),
        ])
        .unwrap();
        assert_eq!(
            how(&sets, &example("s", "How many are there?", "SELECT COUNT(*) FROM a")),
            Some(How::SameQuestion)
        );
        assert_eq!(how(&sets, &example("s", "How many are there?", "SELECT count(*) FROM b")), None);
    }

    /// A page of a filing in upstream's form, with no question yet.
    fn filing_page() -> Value {
        json!({
            "id": "ABC/2014/page_9.pdf-2", "filename": "ABC/2014/page_9.pdf", "pre_text": [], "post_text": [],
            "table": [["", "2014", "2013"], ["sales", "$ 5,829", "( 12.5 )"], ["costs", "7", "8"]]
        })
    }

    /// Its table as a re-packaging writes it.
    const FILING_TABLE: &str = "| | 2014 | 2013 |\n| sales | 5829 | -12.5 |\n| costs | 7 | 8 |\n\n";

    #[test]
    fn a_page_and_a_table_under_another_name_are_found() {
        let mut record = filing_page();
        record["annotation"] = json!({
            "dialogue_break": ["what were sales?"], "turn_program": ["5829"], "exe_ans_list": [5829]
        });
        let sets = sets(&[record]).unwrap();
        let mut same = example("x\n\n| a |\n| 1 |\n\n", "other", "1");
        assert_eq!(how(&sets, &same), None);
        same.document = "ABC/2014/page_9.pdf".to_string();
        assert_eq!(how(&sets, &same), Some(How::SamePage));
        assert_eq!(how(&sets, &example(FILING_TABLE, "What were sales?", "5829")), Some(How::SameTable));
        assert_eq!(how(&sets, &example(FILING_TABLE, "What were costs?", "7")), None);
        assert_eq!(
            how(
                &sets,
                &example(&FILING_TABLE.replace('7', "9").replace("5829", "1"), "What were sales?", "1")
            ),
            None
        );
    }

    #[test]
    fn a_single_question_about_a_page_is_one_of_a_filing() {
        let mut record = filing_page();
        record["qa"] = json!({"question": "what were sales?", "program": "add(5829, 0)", "exe_ans": 5829.0});
        let questions = sets(std::slice::from_ref(&record)).unwrap();
        let mut page = example("x\n\n", "another", "1");
        page.document = "ABC/2014/page_9.pdf".to_string();
        assert_eq!(how(&questions, &page), Some(How::SamePage));
        assert_eq!(how(&questions, &example(FILING_TABLE, "What were sales?", "5829")), Some(How::SameTable));
        assert_eq!(how(&questions, &example(FILING_TABLE, "What were costs?", "7")), None);
        record["qa"].as_object_mut().unwrap().remove("program");
        let text = crate::error::render(&sets(&[record]).unwrap_err());
        assert!(text.contains("record 1") && text.contains("`qa.program`"), "{text}");
    }

    #[test]
    fn a_file_of_another_kind_is_told() {
        let text = crate::error::render(&sets(&[json!({"text": "x"})]).unwrap_err());
        assert!(text.contains("record 1 is of no evaluation set") && text.contains("HumanEval"), "{text}");
        assert!(text.contains("data.contamination.against"), "{text}");
        let spec = ContaminationSpec { against: vec!["nowhere.json".into()], ..ContaminationSpec::default() };
        let text = crate::error::render(&EvaluationSets::read(&spec).unwrap_err());
        assert!(text.contains("`nowhere.json`"), "{text}");
    }
}
