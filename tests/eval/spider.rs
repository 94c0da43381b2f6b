//! Spider's questions: selection, judging, asking through the engine.

use std::path::{Path, PathBuf};

use anyhow::Result;
use granite::engine::{CausalLm, Engine, EngineOptions};
use granite::eval::database::QueryLimits;
use granite::eval::tasks::spider::{
    self, Databases, Prediction, Question, Selection, Speaker, Verdict, judge, read_questions, select,
};

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

/// Says the same tokens whatever it is asked.
struct Parrot(Vec<u32>);

impl CausalLm for Parrot {
    type Cache = usize;

    fn context(&self) -> usize {
        64
    }

    fn vocabulary(&self) -> usize {
        256
    }

    fn new_cache(&self, _capacity: usize) -> usize {
        0
    }

    fn forward_cached(&self, _input_ids: &[u32], said: &mut usize) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; 256];
        // Byte 0 ends an answer.
        logits[self.0.get(*said).copied().unwrap_or(0) as usize] = 1.0;
        *said += 1;
        Ok(logits)
    }
}

fn asked(answer: &str, max_tokens: usize, questions: &[Question]) -> (Vec<Prediction>, spider::SpiderReport) {
    let folder = folder();
    let mut databases = Databases::new(folder.path(), limits());
    let parrot = Parrot(answer.bytes().map(u32::from).collect());
    let options = EngineOptions { queue: spider::UNDER_WAY, context: None };
    let engine = Engine::spawn(parrot, &options).unwrap();
    let speaker = Speaker {
        prompt: &|question| Ok(question.question.bytes().map(u32::from).collect()),
        decode: &|ids| Ok(ids.iter().map(|id| char::from(*id as u8)).collect()),
        stop_token_ids: vec![0],
        max_tokens,
    };
    let selection = select(questions, &mut databases, None).unwrap();
    let mut kept = Vec::new();
    let keep = |prediction: &Prediction| {
        kept.push(prediction.clone());
        Ok(())
    };
    let predictions = spider::ask(questions, &selection, &mut databases, &engine, &speaker, keep).unwrap();
    assert_eq!(kept, predictions);
    let report = spider::summarize(&predictions, questions.len(), &selection);
    (predictions, report)
}

#[test]
fn answers_are_taken_apart_judged_and_counted() {
    let count = "SELECT count(*) FROM city";
    let mut questions: Vec<Question> = (0..20).map(|_| question("cities", count)).collect();
    questions[3].query = "SELECT 4".to_string();
    questions[4].query = "SELECT nothing FROM nowhere".to_string();
    questions[5].question = "?".repeat(64);
    questions[6].db_id = "nothing".to_string();
    let (predictions, report) = asked("```sql\nSELECT 3;\n```", 40, &questions);
    assert_eq!(predictions.len(), 19);
    assert_eq!(predictions[0].predicted, "SELECT 3");
    assert_eq!(predictions[0].verdict, Verdict::Correct);
    assert_eq!((predictions[6].record, predictions[6].verdict), (8, Verdict::Correct));
    assert_eq!(predictions[3].verdict, Verdict::Wrong);
    assert_eq!(predictions[5].verdict, Verdict::NotAsked);
    assert!(predictions[5].error.as_deref().unwrap().contains("64 tokens"));
    assert_eq!((report.correct, report.scored, report.executable), (16, 18, 17));
    assert_eq!((report.too_long, report.gold_failed, report.without_rows, report.cut), (1, 1, 1, 0));
    assert_eq!(report.execution_accuracy, 16.0 / 18.0);
}

#[test]
fn an_answer_cut_at_the_limit_is_counted() {
    let (predictions, report) = asked("SELECT 3 and so on and on", 8, &[question("cities", "SELECT 3")]);
    assert_eq!(predictions[0].answer, "SELECT 3");
    assert_eq!((report.cut, report.correct), (1, 1));
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
