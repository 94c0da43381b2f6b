//! HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021): Python that must pass the tests of its problem.
//!
//! Programs run in the [sandbox](crate::eval::sandbox). One answer is asked for a problem, greedily: pass@1.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use rayon::prelude::*;
use serde::Deserialize;

use crate::data::example::{Message, Role};
use crate::data::reader::read_records;
use crate::eval::fence;
use crate::eval::sandbox::Sandbox;
use crate::eval::task::{Judgement, Prompt, Question, Task, Verdict, spread};
use crate::recipe::TaskSpec;

#[derive(Debug, Deserialize)]
struct HumanEvalRecord {
    task_id: String,
    prompt: String,
    entry_point: String,
    canonical_solution: String,
    test: String,
}

#[derive(Debug, Deserialize)]
struct MbppRecord {
    task_id: u64,
    /// The sanitized file says `prompt`, the whole one `text`.
    #[serde(alias = "text")]
    prompt: String,
    code: String,
    #[serde(default)]
    test_imports: Vec<String>,
    #[serde(default)]
    test_setup_code: String,
    test_list: Vec<String>,
}

/// A problem of either set.
#[derive(Debug, Clone)]
struct Problem {
    id: String,
    /// What the model is asked.
    request: String,
    reference: String,
    form: Form,
}

/// How an answer becomes a program.
#[derive(Debug, Clone)]
enum Form {
    /// A function is begun; the answer goes on with it, or says it whole.
    Completion { prompt: String, entry_point: String, test: String },
    /// The answer is whole; the tests follow.
    Whole { before: String, test: String },
}

impl Form {
    fn program(&self, code: &str) -> String {
        match self {
            Self::Completion { prompt, entry_point, test } => {
                // What the prompt imports and defines before the function is not always said again.
                let before = if defines(code, entry_point) { ahead_of(prompt, entry_point) } else { prompt };
                format!("{before}{code}\n{test}\ncheck({entry_point})\n")
            }
            Self::Whole { before, test } => format!("{before}\n{code}\n{test}\n"),
        }
    }
}

fn definition(line: &str, name: &str) -> bool {
    let rest = line.strip_prefix("async ").unwrap_or(line).strip_prefix("def ");
    rest.and_then(|rest| rest.trim_start().strip_prefix(name))
        .is_some_and(|rest| rest.trim_start().starts_with('('))
}

/// Whether the code defines the function outside of any other.
fn defines(code: &str, name: &str) -> bool {
    code.lines().any(|line| definition(line, name))
}

/// The prompt up to where the function begins.
fn ahead_of<'a>(prompt: &'a str, name: &str) -> &'a str {
    let mut at = 0;
    for line in prompt.split_inclusive('\n') {
        if definition(line, name) {
            break;
        }
        at += line.len();
    }
    &prompt[..at]
}

/// The task.
#[derive(Debug)]
pub struct Code {
    name: &'static str,
    problems: Vec<Problem>,
    sandbox: Arc<Sandbox>,
    max_tokens: usize,
}

impl Code {
    /// Reads HumanEval's problems.
    ///
    /// # Errors
    /// When the file is missing or of another form.
    pub fn human_eval(spec: &TaskSpec, limit: Option<usize>, sandbox: Arc<Sandbox>) -> Result<Self> {
        let mut problems = Vec::new();
        read_records::<HumanEvalRecord>(&spec.path, &["HumanEval.jsonl"], &[], &mut |_, record| {
            problems.push(completion(record));
            Ok(())
        })?;
        Ok(Self::of("humaneval", &problems, spec, limit, sandbox))
    }

    /// Reads MBPP's problems, sanitized or all.
    ///
    /// # Errors
    /// When the file is missing or of another form.
    pub fn mbpp(spec: &TaskSpec, limit: Option<usize>, sandbox: Arc<Sandbox>) -> Result<Self> {
        let mut problems = Vec::new();
        read_records::<MbppRecord>(
            &spec.path,
            &["sanitized-mbpp.json", "mbpp.jsonl"],
            &[],
            &mut |_, record| {
                if record.test_list.is_empty() {
                    bail!("task {} has no tests", record.task_id);
                }
                problems.push(whole(record));
                Ok(())
            },
        )?;
        Ok(Self::of("mbpp", &problems, spec, limit, sandbox))
    }

    fn of(
        name: &'static str,
        problems: &[Problem],
        spec: &TaskSpec,
        limit: Option<usize>,
        sandbox: Arc<Sandbox>,
    ) -> Self {
        let problems = spread(problems, limit.or(spec.limit));
        Self { name, problems, sandbox, max_tokens: spec.max_tokens }
    }
}

impl Code {
    fn judged(&self, at: usize, answer: &str) -> Result<Judgement> {
        let Problem { id, form, .. } = &self.problems[at];
        let code = fence::code(answer);
        let ending = self.sandbox.run(&form.program(code)).with_context(|| format!("problem {id}"))?;
        let mut judgement = Judgement::of(code, false);
        match ending.failure() {
            None => judgement = Judgement::of(code, true),
            Some(error) if error.starts_with("AssertionError") => judgement.error = Some(error),
            Some(error) => (judgement.verdict, judgement.error) = (Verdict::Failed, Some(error)),
        }
        Ok(judgement)
    }
}

fn completion(record: HumanEvalRecord) -> Problem {
    let HumanEvalRecord { task_id, prompt, entry_point, canonical_solution, test } = record;
    let request = format!(
        "Complete this Python function. Reply with the whole function in one block of code.\n\n```python\n{}\n```",
        prompt.trim_end()
    );
    let form = Form::Completion { prompt, entry_point, test };
    Problem { id: task_id, request, reference: canonical_solution, form }
}

fn whole(record: MbppRecord) -> Problem {
    let MbppRecord { task_id, prompt, code, test_imports, test_setup_code, test_list } = record;
    let test = test_list.join("\n");
    let request = format!(
        "{}\nReply with Python in one block of code. It must pass these tests:\n\n```python\n{test}\n```",
        prompt.trim()
    );
    let before = [test_imports.join("\n"), test_setup_code].join("\n");
    Problem { id: task_id.to_string(), request, reference: code, form: Form::Whole { before, test } }
}

impl Task for Code {
    fn name(&self) -> &'static str {
        self.name
    }

    fn measures(&self) -> &'static [&'static str] {
        &["pass@1"]
    }

    fn len(&self) -> usize {
        self.problems.len()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    fn question(&self, at: usize) -> Result<Question> {
        let Problem { id, request, reference, .. } = &self.problems[at];
        Ok(Question {
            id: id.clone(),
            group: String::new(),
            prompt: Prompt::Chat(vec![Message::new(Role::User, request.clone())]),
            text: request.clone(),
            reference: reference.clone(),
        })
    }

    fn judge(&mut self, at: usize, answer: &str) -> Result<Judgement> {
        self.judged(at, answer)
    }

    fn judge_all(&mut self, answers: &[(usize, &str)]) -> Result<Vec<Judgement>> {
        answers.par_iter().map(|(at, answer)| self.judged(*at, answer)).collect()
    }

    /// A program each processor: their time is limited by the clock on the wall.
    fn side_by_side(&self) -> usize {
        rayon::current_num_threads()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPT: &str =
        "import math\n\ndef near(x):\n    return x\n\ndef area(r):\n    \"\"\" Area. \"\"\"\n";

    #[test]
    fn a_completion_goes_on_and_a_whole_function_stands_instead() {
        let form = Form::Completion {
            prompt: PROMPT.to_string(),
            entry_point: "area".to_string(),
            test: "def check(f): pass".to_string(),
        };
        let end = "\ndef check(f): pass\ncheck(area)\n";
        assert_eq!(form.program("    return 3 * r"), format!("{PROMPT}    return 3 * r{end}"));
        let whole = "from math import pi\n\ndef area (r):\n    return pi * r";
        assert_eq!(form.program(whole), format!("import math\n\ndef near(x):\n    return x\n\n{whole}{end}"));
        // A function of that name inside another is a completion's own affair.
        let inner = "    def area(x):\n        return x\n    return area(r)";
        assert_eq!(form.program(inner), format!("{PROMPT}{inner}{end}"));
        assert!(!defines("def areas(r): pass", "area") && defines("async def area(r): pass", "area"));
    }
}
