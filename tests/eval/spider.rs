//! Spider's questions: selection, judging, asking through the engine.

use std::path::{Path, PathBuf};

use anyhow::Result;
use granite::engine::{CausalLm, Engine, EngineOptions};
use granite::eval::asking::{self, Speaker};
use granite::eval::comparison::{self, TaskResults, TaskSummary};
use granite::eval::database::QueryLimits;
use granite::eval::hardness::Hardness;
use granite::eval::results::Results;
use granite::eval::task::{Answered, Task, Verdict};
use granite::eval::tasks::spider::{Databases, Question, Selection, Spider, judge, read_questions, select};
use granite::model::continuation::Continuation;
use granite::recipe::SpiderEvalSpec;

fn limits() -> QueryLimits {
    QueryLimits::default()
}

/// Two databases: one of cities, one without a row.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, sql) in [
        (
            "cities",
            "CREATE TABLE city (name TEXT, country TEXT, people REAL);
             INSERT INTO city VALUES ('Oslo', 'Norway', 0.7), ('Bergen', 'Norway', 0.3), ('Turin', 'Italy', 0.8);",
        ),
        ("nothing", "CREATE TABLE city (name TEXT);"),
    ] {
        let place = folder.path().join(name);
        std::fs::create_dir(&place).unwrap();
        let connection = rusqlite::Connection::open(place.join(format!("{name}.sqlite"))).unwrap();
        connection.execute_batch(sql).unwrap();
    }
    folder
}

fn question(db_id: &str, query: &str) -> Question {
    Question { db_id: db_id.to_string(), question: "Which?".to_string(), query: query.to_string() }
}

#[test]
fn questions_that_cannot_be_judged_are_left_out_and_counted() {
    let folder = folder();
    let mut databases = Databases::new(folder.path(), limits());
    let questions: Vec<Question> = ["nothing", "cities", "elsewhere", "cities", "cities", "nothing"]
        .map(|db_id| question(db_id, "SELECT 1"))
        .to_vec();
    let expected = Selection { asked: vec![1, 3, 4], without_rows: 2, without_database: 1 };
    assert_eq!(select(&questions, &mut databases, None).unwrap(), expected);
    assert_eq!(select(&questions, &mut databases, Some(2)).unwrap().asked, [1, 3]);
    let error = select(&questions[..1], &mut databases, None).unwrap_err();
    assert!(format!("{error:#}").contains("none of 1 questions"), "{error:#}");
}

#[test]
fn judging_tells_answers_apart() {
    let folder = folder();
    let mut databases = Databases::new(folder.path(), limits());
    let mut verdict =
        |gold: &str, predicted: &str| judge(&mut databases, "cities", gold, predicted).unwrap().0;
    let norway = "SELECT name FROM city WHERE country = 'Norway'";
    assert_eq!(verdict(norway, "select NAME from CITY where people < 0.75"), Verdict::Correct);
    assert_eq!(verdict(norway, "SELECT name FROM city"), Verdict::Wrong);
    assert_eq!(verdict(norway, "SELECT name, country FROM city WHERE country = 'Norway'"), Verdict::Wrong);
    assert_eq!(verdict(norway, "SELECT town FROM city"), Verdict::Failed);
    assert_eq!(verdict(norway, ""), Verdict::Failed);
    assert_eq!(verdict(norway, "DELETE FROM city"), Verdict::Failed);
    assert_eq!(verdict("SELECT town FROM city", norway), Verdict::GoldFailed);
    assert_eq!(
        verdict("SELECT name FROM city ORDER BY people", "SELECT name FROM city ORDER BY people DESC"),
        Verdict::Wrong
    );
    assert_eq!(
        verdict("SELECT name FROM city", "SELECT name FROM city ORDER BY people DESC"),
        Verdict::Correct
    );
    assert_eq!(verdict("SELECT country FROM city", "SELECT DISTINCT country FROM city"), Verdict::Correct);
    assert_eq!(verdict("SELECT sum(people) FROM city", "SELECT 0.8 + 0.3 + 0.7"), Verdict::Correct);
}

#[test]
fn a_prediction_must_agree_on_every_file_of_a_database() {
    let folder = folder();
    let path = folder.path().join("cities/variant.sqlite");
    let variant = rusqlite::Connection::open(path).unwrap();
    variant
        .execute_batch("CREATE TABLE city (name TEXT, country TEXT, people REAL); INSERT INTO city VALUES ('Rome', 'Italy', 0.5);")
        .unwrap();
    let mut databases = Databases::new(folder.path(), limits());
    let mut verdict =
        |gold: &str, predicted: &str| judge(&mut databases, "cities", gold, predicted).unwrap().0;
    let count = "SELECT count(*) FROM city";
    assert_eq!(verdict(count, "select count(name) from city"), Verdict::Correct);
    assert_eq!(verdict(count, "SELECT 3"), Verdict::Wrong);
    // Right on the variant, wrong on the first.
    assert_eq!(verdict(count, "SELECT 1"), Verdict::Wrong);
}

/// Says the same tokens whatever it is asked.
struct Parrot(Vec<u32>);

impl CausalLm for Parrot {
    type Cache = usize;

    fn context(&self) -> usize {
        400
    }

    fn vocabulary(&self) -> usize {
        256
    }

    fn new_cache(&self, _capacity: usize) -> Result<usize> {
        Ok(0)
    }

    fn forward_cached(&self, batch: &mut [Continuation<'_, usize>]) -> Result<Vec<Vec<f32>>> {
        let after = |one: &mut Continuation<'_, usize>| {
            let mut logits = vec![0.0; 256];
            // Byte 0 ends an answer.
            logits[self.0.get(*one.cache).copied().unwrap_or(0) as usize] = 1.0;
            *one.cache += 1;
            logits
        };
        Ok(batch.iter_mut().map(after).collect())
    }
}

const SCHEMA: &str = r#"{"table_names_original": ["city"], "column_names_original": [[-1, "*"], [0, "name"]],
    "column_types": ["text", "text"], "primary_keys": [], "foreign_keys": []"#;

/// The files of a task whose questions these are.
fn task(folder: &Path, questions: &[Question], max_tokens: usize) -> Spider {
    let records = questions.iter().map(|Question { db_id, question, query }| {
        serde_json::json!({"db_id": db_id, "question": question, "query": query})
    });
    std::fs::write(folder.join("dev.json"), serde_json::Value::from_iter(records).to_string()).unwrap();
    let schemas = ["cities", "nothing"].map(|name| format!("{SCHEMA}, \"db_id\": \"{name}\"}}"));
    std::fs::write(folder.join("tables.json"), format!("[{}]", schemas.join(","))).unwrap();
    let spec = SpiderEvalSpec {
        path: folder.join("dev.json"),
        tables: folder.join("tables.json"),
        databases: folder.to_path_buf(),
        limit: None,
        max_tokens,
    };
    Spider::open(&spec, None).unwrap()
}

fn ask(task: &mut Spider, answer: &str, results: &mut Results<Answered>) {
    let parrot = Parrot(answer.bytes().map(u32::from).collect());
    let batch = 3;
    let queue = asking::under_way(batch);
    let options = EngineOptions { queue, context: None, batch, cached_tokens: None };
    let engine = Engine::spawn(parrot, &options).unwrap();
    let speaker = Speaker {
        encode: &|messages| Ok(messages[0].content.bytes().map(u32::from).collect()),
        decode: &|ids| Ok(ids.iter().map(|id| char::from(*id as u8)).collect()),
        stop_token_ids: vec![0],
    };
    asking::ask(task, &engine, &speaker, results).unwrap();
}

fn asked(answer: &str, max_tokens: usize, questions: &[Question]) -> (Vec<Answered>, TaskSummary) {
    let folder = folder();
    let mut task = task(folder.path(), questions, max_tokens);
    let path = folder.path().join("answers.jsonl");
    let mut results = Results::open(&path).unwrap();
    ask(&mut task, answer, &mut results);
    let answers = results.all().to_vec();
    assert_eq!(Results::<Answered>::open(&path).unwrap().all(), answers);
    let summed = TaskResults {
        name: task.name(),
        measures: task.measures(),
        answers: answers.clone(),
        left_out: task.left_out(),
    };
    (answers, comparison::task(&summed, 1))
}

#[test]
fn answers_are_taken_apart_judged_and_counted() {
    let count = "SELECT count(*) FROM city";
    let mut questions: Vec<Question> = (0..20).map(|_| question("cities", count)).collect();
    questions[3].query = "SELECT 4 ORDER BY 1".to_string();
    questions[4].query = "SELECT nothing FROM nowhere".to_string();
    questions[5].question = "?".repeat(400);
    questions[6].db_id = "nothing".to_string();
    let (answers, summary) = asked("```sql\nSELECT 3;\n```", 40, &questions);
    assert_eq!(answers.len(), 19);
    assert_eq!((answers[0].extracted.as_str(), answers[0].verdict), ("SELECT 3", Verdict::Correct));
    assert_eq!((answers[6].id.as_str(), answers[6].verdict), ("8", Verdict::Correct));
    assert_eq!((answers[3].verdict, answers[3].group.as_str()), (Verdict::Wrong, "easy"));
    assert_eq!(answers[5].verdict, Verdict::NotAsked);
    assert!(answers[5].error.as_deref().unwrap().contains("400"));
    assert_eq!((summary.scored, summary.cut), (18, 0));
    let verdicts: Vec<(&str, usize)> = summary.verdicts.into_iter().collect();
    assert_eq!(verdicts, [("correct", 16), ("gold_failed", 1), ("not_asked", 1), ("wrong", 1)]);
    assert_eq!(summary.left_out, [("databases without rows".to_string(), 1)].into());
    assert_eq!(summary.measures[0].score.unwrap().estimate, 16.0 / 18.0);
}

#[test]
fn an_answer_cut_at_the_limit_is_counted() {
    let (answers, summary) = asked("SELECT 3 and so on and on", 8, &[question("cities", "SELECT 3")]);
    assert_eq!(answers[0].answer, "SELECT 3");
    assert_eq!((summary.cut, summary.verdicts["correct"]), (1, 1));
}

#[test]
fn what_was_answered_before_is_not_asked_again() {
    let folder = folder();
    let questions: Vec<Question> = (1..=5).map(|n| question("cities", &format!("SELECT {n}"))).collect();
    let mut task = task(folder.path(), &questions, 40);
    let path = folder.path().join("answers.jsonl");
    let mut results = Results::open(&path).unwrap();
    ask(&mut task, "SELECT 3", &mut results);
    let whole = std::fs::read_to_string(&path).unwrap();
    let second = whole.match_indices('\n').nth(1).unwrap().0;
    // Two results and the beginning of the third, as a killed process leaves them.
    std::fs::write(&path, &whole[..second + 20]).unwrap();
    let mut results = Results::open(&path).unwrap();
    ask(&mut task, "SELECT 4", &mut results);
    let verdicts: Vec<Verdict> = results.all().iter().map(|one| one.verdict).collect();
    use Verdict::{Correct, Wrong};
    // The first two are the first parrot's.
    assert_eq!(verdicts, [Wrong, Wrong, Wrong, Correct, Wrong]);
    assert!(std::fs::read_to_string(&path).unwrap().starts_with(&whole[..=second]));
    ask(&mut task, "SELECT 5", &mut results);
    assert_eq!(results.all().len(), 5);
}

#[test]
fn damaged_questions_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dev.json");
    for text in
        ["", "{}", "[{\"question\": \"?\"}]", "[{\"db_id\": 1, \"question\": \"?\", \"query\": \"\"}]"]
    {
        std::fs::write(&path, text).unwrap();
        let error = format!("{:#}", read_questions(&path).unwrap_err());
        assert!(error.contains("dev.json"), "{error}");
    }
}

fn real_data() -> Option<PathBuf> {
    let folder =
        std::env::var_os("GRANITE_TEST_DATA").map(|folder| PathBuf::from(folder).join("dumps/spider"));
    if folder.is_none() {
        eprintln!("skipped: GRANITE_TEST_DATA is not set");
    }
    folder
}

fn real(folder: &Path) -> (Vec<Question>, Databases, Selection) {
    let questions = read_questions(&folder.join("dev.json")).unwrap();
    let mut databases = Databases::new(&folder.join("database"), limits());
    let selection = select(&questions, &mut databases, None).unwrap();
    (questions, databases, selection)
}

#[test]
fn hardness_is_counted_as_published() {
    let Some(folder) = real_data() else { return };
    let questions = read_questions(&folder.join("dev.json")).unwrap();
    let count = |class| questions.iter().filter(|one| Hardness::of(&one.query) == class).count();
    use Hardness::{Easy, Extra, Hard, Medium};
    assert_eq!([Easy, Medium, Hard, Extra].map(count), [248, 446, 174, 166]);
}

#[test]
fn gold_against_gold_is_one_on_the_real_databases() {
    let Some(folder) = real_data() else { return };
    let (questions, mut databases, selection) = real(&folder);
    assert_eq!(questions.len(), 1034);
    assert_eq!((selection.asked.len(), selection.without_rows, selection.without_database), (972, 62, 0));
    for index in &selection.asked {
        let Question { db_id, query, .. } = &questions[*index];
        let (verdict, error) = judge(&mut databases, db_id, query, query).unwrap();
        assert_eq!(verdict, Verdict::Correct, "record {}: {query}: {error:?}", index + 1);
    }
}

#[test]
fn mutated_gold_queries_are_told_apart_on_the_real_databases() {
    let Some(folder) = real_data() else { return };
    let (questions, mut databases, selection) = real(&folder);
    let mut verdicts = |mutate: &dyn Fn(&str) -> String| -> (usize, usize) {
        let mut correct = 0;
        for index in &selection.asked {
            let Question { db_id, query, .. } = &questions[*index];
            let (verdict, _) = judge(&mut databases, db_id, query, &mutate(query)).unwrap();
            correct += usize::from(verdict == Verdict::Correct);
        }
        (correct, selection.asked.len())
    };
    // Nothing found is the right answer where the gold query finds nothing, and only there.
    let (empty, _) = verdicts(&|_| "SELECT 1 WHERE 0".to_string());
    assert!(empty * 10 < selection.asked.len(), "{empty} gold queries find nothing");
    let column_more = verdicts(&|query| format!("SELECT *, 1 FROM ({})", query.trim_end_matches(';')));
    assert_eq!(column_more.0, empty);
    let row_more = verdicts(&|query| {
        let query = query.trim_end_matches(';');
        format!("SELECT * FROM ({query}) UNION ALL SELECT * FROM (SELECT * FROM ({query}) LIMIT 1)")
    });
    assert_eq!(row_more.0, empty);
    let (correct, all) = verdicts(&|_| "SELECT 'no such answer'".to_string());
    assert_eq!(correct, 0, "of {all}");
    // White space, letter case of keywords and DISTINCT change nothing.
    let (correct, all) = verdicts(&|query| {
        format!(
            "  {}  ",
            query
                .replace("SELECT", "select DISTINCT ")
                .replace("select DISTINCT  DISTINCT", "select DISTINCT")
        )
    });
    assert_eq!(correct, all);
}
