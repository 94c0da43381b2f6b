//! The tasks on the real sets: references are right, everything else is wrong.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use granite::eval::finance_program::{self, Outcome};
use granite::eval::sandbox::{Limits, Sandbox};
use granite::eval::task::{Prompt, Task, Verdict};
use granite::eval::tasks::code::Code;
use granite::eval::tasks::finance::Finance;
use granite::eval::tasks::gsm8k::Gsm8k;
use granite::recipe::{ConvFinQaTarget, FinanceTaskSpec, TaskSpec};
use serde_json::{Value, json};

fn real(file: &str) -> Option<PathBuf> {
    let path = std::env::var_os("GRANITE_TEST_DATA").map(|folder| PathBuf::from(folder).join(file));
    if path.is_none() {
        eprintln!("skipped: GRANITE_TEST_DATA is not set");
    }
    path
}

fn spec(path: &Path) -> TaskSpec {
    TaskSpec { path: path.to_path_buf(), limit: None, max_tokens: 1 }
}

fn finance(path: &Path, target: ConvFinQaTarget) -> FinanceTaskSpec {
    FinanceTaskSpec { path: path.to_path_buf(), target, limit: None, max_tokens: 1 }
}

fn sandbox() -> Arc<Sandbox> {
    // A busy machine is slow; no reference is endless.
    let limits = Limits { time: Duration::from_secs(60), ..Limits::default() };
    Arc::new(Sandbox::open(Path::new(env!("CARGO_BIN_EXE_granite")), limits).unwrap())
}

/// How many of a task's questions are right when each is answered by `answer` of its reference.
fn right(task: &mut dyn Task, every: usize, answer: impl Fn(&str) -> String) -> (usize, usize) {
    let places: Vec<usize> = (0..task.len()).step_by(every).collect();
    let answers: Vec<String> =
        places.iter().map(|at| answer(&task.question(*at).unwrap().reference)).collect();
    let given: Vec<(usize, &str)> = places.into_iter().zip(answers.iter().map(String::as_str)).collect();
    let judged = task.judge_all(&given).unwrap();
    assert_eq!(judged.len(), given.len());
    for one in &judged {
        assert_eq!(one.scores.len(), task.measures().len());
        assert_eq!(one.scores[0] == 1.0, one.verdict == Verdict::Correct);
    }
    (judged.iter().filter(|one| one.verdict == Verdict::Correct).count(), judged.len())
}

/// A function's body that does nothing.
fn nothing(reference: &str) -> String {
    match reference.lines().find(|line| line.starts_with("def ")) {
        Some(header) => format!("{}\n    return None\n", header.trim_end().trim_end_matches(|c| c != ':')),
        None => "    return None\n".to_string(),
    }
}

#[test]
fn reference_programs_pass_their_tests_and_others_do_not() {
    let (Some(human_eval), Some(mbpp)) =
        (real("evaltasks/HumanEval.jsonl.gz"), real("evaltasks/sanitized-mbpp.json"))
    else {
        return;
    };
    if !crate::sandbox::has_landlock() {
        return;
    }
    let sandbox = sandbox();
    let mut task = Code::human_eval(&spec(&human_eval), None, Arc::clone(&sandbox)).unwrap();
    assert_eq!(right(&mut task, 1, str::to_string), (164, 164));
    assert_eq!(right(&mut task, 1, nothing), (0, 164));
    assert_eq!(right(&mut task, 20, |_| "I cannot do this.".to_string()).0, 0);
    // Side by side the order is kept: right and wrong in turn.
    let references: Vec<String> = (0..9).map(|at| task.question(at).unwrap().reference).collect();
    let mixed: Vec<(usize, &str)> = references
        .iter()
        .map(|one| if one.len() % 2 == 0 { one.as_str() } else { "    return" })
        .enumerate()
        .collect();
    let together = task.judge_all(&mixed).unwrap();
    for ((at, answer), judged) in mixed.into_iter().zip(together) {
        let alone = task.judge(at, answer).unwrap();
        assert_eq!((alone.verdict, alone.extracted), (judged.verdict, judged.extracted), "{at}");
    }
    let mut task = Code::mbpp(&spec(&mbpp), None, sandbox).unwrap();
    assert_eq!(right(&mut task, 1, |code| format!("Here it is:\n```python\n{code}\n```")), (427, 427));
    assert_eq!(right(&mut task, 40, |_| String::new()).0, 0);
}

#[test]
fn word_problems_are_judged_by_their_number() {
    let Some(path) = real("evaltasks/gsm8k_test.jsonl") else { return };
    let mut task = Gsm8k::open(&spec(&path), None).unwrap();
    assert_eq!(right(&mut task, 1, str::to_string), (1319, 1319));
    let stated = |reference: &str| reference.rsplit_once("####").unwrap().1.trim().to_string();
    assert_eq!(right(&mut task, 1, |one| format!("So the answer is ${}.00.", stated(one))), (1319, 1319));
    assert_eq!(right(&mut task, 1, |one| format!("#### {}1", stated(one))), (0, 1319));
    assert_eq!(right(&mut task, 1, |_| "I do not know.".to_string()), (0, 1319));
}

/// A file of turns says every turn again that a later one continues: the conversations are the same, and none is lost.
#[test]
fn earlier_turns_of_a_file_of_turns_are_no_conversations_left_out() {
    let Some(path) = real("dumps/convfinqa/train.json") else { return };
    let records: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let of_turns = |record: &Value| -> Vec<Value> {
        let annotation = &record["annotation"];
        let asked = annotation["dialogue_break"].as_array().unwrap();
        let turn = |at: usize| {
            let mut turn = record.clone();
            turn["id"] = json!(format!("{}_{at}", record["id"].as_str().unwrap()));
            turn["annotation"]["cur_dial"] = json!(asked[..=at]);
            turn["annotation"]["cur_program"] = annotation["turn_program"][at].clone();
            turn["annotation"]["exe_ans"] = annotation["exe_ans_list"][at].clone();
            turn["annotation"]["turn_ind"] = json!(at);
            turn
        };
        (0..asked.len()).map(turn).collect()
    };
    let folder = tempfile::tempdir().unwrap();
    let turns = folder.path().join("train_turn.json");
    let all: Vec<Value> = records.iter().flat_map(of_turns).collect();
    assert_eq!(all.len(), 183);
    std::fs::write(&turns, json!(all).to_string()).unwrap();
    let task = |path: &Path| Finance::conversations(&finance(path, ConvFinQaTarget::Answer), None).unwrap();
    let (whole, apart) = (task(&path), task(&turns));
    assert_eq!((whole.len(), apart.len()), (183, 183));
    assert_eq!(apart.left_out(), whole.left_out());
    for at in [0, 90, 182] {
        let [one, other] = [&whole, &apart].map(|task| task.question(at).unwrap());
        assert_eq!((one.text, one.reference), (other.text, other.reference));
    }
}

#[test]
fn turns_are_questions_and_their_programs_give_their_answers() {
    for (file, turns) in [("train.json", 183), ("convfinqa_dataset.json", 1490)] {
        let Some(path) = real(&format!("dumps/convfinqa/{file}")) else { return };
        let mut task =
            Finance::conversations(&finance(&path, ConvFinQaTarget::ProgramThenAnswer), None).unwrap();
        let (correct, asked) = right(&mut task, 1, str::to_string);
        assert_eq!((correct, asked), (turns, turns), "{file}");
        let (correct, _) = right(&mut task, 1, |one| one.rsplit_once("Answer: ").unwrap().1.to_string());
        assert_eq!(correct, turns, "{file}: the number alone");
        let (correct, _) =
            right(&mut task, 1, |one| format!("{}, add(#0, 98765)", one.lines().next().unwrap()));
        assert_eq!(correct, 0, "{file}: another program");
        let last = task.question(turns - 1).unwrap();
        let Prompt::Chat(messages) = last.prompt else { panic!("messages were expected") };
        assert_eq!(messages.len() % 2, 1, "what is asked comes last");
    }
}

#[test]
fn single_questions_over_the_same_pages_are_finqas() {
    let Some(path) = real("dumps/convfinqa/train.json") else { return };
    // Conversations of the kind `Single` carry the question of FinQA that they were made from.
    let records: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let single: Vec<Value> = records.into_iter().filter(|one| one.get("qa").is_some()).collect();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("test.json");
    std::fs::write(&file, json!(single).to_string()).unwrap();
    let mut task = Finance::questions(&finance(&file, ConvFinQaTarget::ProgramThenAnswer), None).unwrap();
    let (correct, asked) = right(&mut task, 1, str::to_string);
    assert!(asked > 20 && asked == single.len());
    assert_eq!(correct, asked);
    std::fs::write(&file, "[{\"id\": \"x\", \"qa\": {}}]").unwrap();
    let spec = finance(&file, ConvFinQaTarget::Answer);
    let text = granite::error::render(&Finance::questions(&spec, None).unwrap_err());
    assert!(text.contains("test.json") && text.contains("qa.question"), "{text}");
}

/// Written by scripts/oracle/finance_programs.py with the published evaluation.
#[test]
fn programs_give_what_the_published_evaluation_gives() {
    let text = include_str!("../fixtures/finance_programs.json");
    let fixture: Value = serde_json::from_str(text).unwrap();
    let table: Vec<Vec<String>> = serde_json::from_value(fixture["table"].clone()).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 500);
    for case in cases {
        let program = case[0].as_str().unwrap();
        let found = match finance_program::execute(program, &table) {
            Ok(Outcome::Number(number)) => json!(number),
            Ok(Outcome::Yes(yes)) => json!(if yes { "yes" } else { "no" }),
            Err(_) => Value::Null,
        };
        let same = match (found.as_f64(), case[1].as_f64()) {
            (Some(found), Some(expected)) => found == expected,
            _ => found == case[1],
        };
        assert!(same, "{program}: {found}, not {}", case[1]);
    }
}

#[test]
fn a_damaged_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("gsm8k.jsonl");
    for text in ["", "{}\n", "{\"question\": \"?\", \"answer\": \"none\"}\n"] {
        std::fs::write(&file, text).unwrap();
        let text = format!("{:#}", Gsm8k::open(&spec(&file), None).unwrap_err());
        assert!(text.contains("gsm8k.jsonl"), "{text}");
    }
    std::fs::write(&file, "{\"question\": \"?\", \"answer\": \"1\\n#### 1\"}\n").unwrap();
    assert_eq!(Gsm8k::open(&spec(&file), Some(7)).unwrap().len(), 1);
}
