//! Spider: a question to a database, answered in SQL. The prompt carries the schema from `tables.json`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use serde::Deserialize;

use super::{Outcome, Reason, Source};
use crate::data::example::{Example, Message, Role};
use crate::data::reader::read_records;
use crate::error::user_error;

/// Names of the file in an archive.
pub const MEMBERS: &[&str] = &["train_spider.json", "train_others.json"];

/// What is asked of the model, before schema and question.
const TASK: &str = "Write one SQLite query that answers the question. Reply with the query only.";

/// A record; the full form's parsed fields are passed over.
#[derive(Debug, Deserialize)]
pub(super) struct Record {
    question: String,
    query: String,
    db_id: String,
}

/// The source.
pub(super) struct Spider<'a> {
    pub schemas: &'a Schemas,
}

impl Source for Spider<'_> {
    type Record = Record;

    fn example(&self, number: u32, record: Record) -> Result<Outcome> {
        let query = tidy_query(&record.query);
        if record.question.trim().is_empty() {
            return Ok(Err(Reason::EmptyQuestion));
        }
        if query.is_empty() {
            return Ok(Err(Reason::EmptyResponse));
        }
        let prompt = self.schemas.prompt(&record.db_id, &record.question)?;
        let question = prompt.len() - single_spaced(&record.question).len()..prompt.len();
        let messages = vec![Message::new(Role::User, prompt), Message::new(Role::Assistant, query)];
        // A question without its schema cannot be answered, so nothing may be cut.
        let document = record.db_id;
        Ok(Ok(Example { messages, document, file: 0, record: number, question, cuts: Vec::new() }))
    }
}

/// The training files of the upstream folder; `None` where `path` is another thing.
///
/// Upstream trains on both: 7,000 questions of its own and 1,659 of older sets.
pub(super) fn upstream_files(path: &Path) -> Option<Vec<PathBuf>> {
    let files = MEMBERS.iter().map(|name| path.join(name)).filter(|file| file.is_file());
    Some(files.collect()).filter(|files: &Vec<PathBuf>| !files.is_empty())
}

/// The file of the schemas, where their folder may be named too.
pub(super) fn tables_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("tables.json") } else { path.to_path_buf() }
}

/// A database as `tables.json` describes it.
#[derive(Debug, Deserialize)]
struct Schema {
    db_id: String,
    table_names_original: Vec<String>,
    /// Table and name of each column; the first stands for `*`.
    column_names_original: Vec<(i64, String)>,
    column_types: Vec<String>,
    primary_keys: Vec<PrimaryKey>,
    foreign_keys: Vec<(usize, usize)>,
}

/// A column, or the columns of a composite key as later releases write it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum PrimaryKey {
    One(usize),
    Several(Vec<usize>),
}

/// The schemas of `tables.json`, rendered.
#[derive(Debug, Clone)]
pub struct Schemas {
    texts: HashMap<String, String>,
    path: String,
}

impl Schemas {
    /// Reads `tables.json`.
    ///
    /// # Errors
    /// When it cannot be read or a schema refers to a column or table that it does not have.
    pub fn read(path: &Path) -> Result<Self> {
        let mut texts = HashMap::new();
        read_records::<Schema>(path, &["tables.json"], &[], &mut |_, schema| {
            let text = schema.render().with_context(|| format!("database `{}`", schema.db_id))?;
            texts.insert(schema.db_id, text);
            Ok(())
        })?;
        Ok(Self { texts, path: path.display().to_string() })
    }

    /// The schema of a database as `CREATE TABLE` statements.
    pub fn get(&self, db_id: &str) -> Option<&str> {
        self.texts.get(db_id).map(String::as_str)
    }

    /// What the model is asked: the task, the schema, the question. Training and evaluation both say it so.
    ///
    /// # Errors
    /// When there is no such database.
    pub fn prompt(&self, db_id: &str, question: &str) -> Result<String> {
        let schema = self.get(db_id).ok_or_else(|| {
            user_error(
                format!("database `{db_id}` is not in `{}`", self.path),
                "take `tables.json` from the same release as the questions",
            )
        })?;
        Ok(format!("{TASK}\n\n{schema}\n\nQuestion: {}", single_spaced(question)))
    }
}

impl Schema {
    fn render(&self) -> Result<String> {
        if self.column_types.len() != self.column_names_original.len() {
            return Err(anyhow!(
                "{} column types for {} columns",
                self.column_types.len(),
                self.column_names_original.len()
            ));
        }
        let mut tables = Vec::with_capacity(self.table_names_original.len());
        for (at, name) in self.table_names_original.iter().enumerate() {
            let mut parts = self.columns(at);
            parts.extend(self.primary_key(at)?);
            parts.extend(self.foreign_keys(at)?);
            tables.push(format!("CREATE TABLE {} ({});", quoted(name), parts.join(", ")));
        }
        Ok(tables.join("\n"))
    }

    fn columns(&self, table: usize) -> Vec<String> {
        let columns = self.column_names_original.iter().zip(&self.column_types);
        columns
            .filter(|((of, _), _)| usize::try_from(*of) == Ok(table))
            .map(|((_, name), kind)| format!("{} {kind}", quoted(name)))
            .collect()
    }

    fn primary_key(&self, table: usize) -> Result<Option<String>> {
        let mut names = Vec::new();
        for key in &self.primary_keys {
            let columns = match key {
                PrimaryKey::One(column) => std::slice::from_ref(column),
                PrimaryKey::Several(columns) => columns.as_slice(),
            };
            for column in columns {
                let (of, name) = self.column(*column)?;
                if of == table {
                    names.push(quoted(name));
                }
            }
        }
        Ok((!names.is_empty()).then(|| format!("PRIMARY KEY ({})", names.join(", "))))
    }

    fn foreign_keys(&self, table: usize) -> Result<Vec<String>> {
        let mut keys = Vec::new();
        for (from, to) in &self.foreign_keys {
            let ((of, name), (other, other_name)) = (self.column(*from)?, self.column(*to)?);
            if of == table {
                let mut key = String::new();
                // Writing into a String cannot fail.
                let _ = write!(
                    key,
                    "FOREIGN KEY ({}) REFERENCES {}({})",
                    quoted(name),
                    quoted(self.table(other)?),
                    quoted(other_name)
                );
                keys.push(key);
            }
        }
        Ok(keys)
    }

    /// Table and name of a column.
    fn column(&self, at: usize) -> Result<(usize, &str)> {
        let found = self.column_names_original.get(at);
        let (table, name) = found.ok_or_else(|| anyhow!("a key names column {at}, which there is not"))?;
        let table =
            usize::try_from(*table).map_err(|_| anyhow!("a key names `{name}`, which is no column"))?;
        Ok((table, name))
    }

    fn table(&self, at: usize) -> Result<&str> {
        let name = self.table_names_original.get(at);
        name.map(String::as_str).ok_or_else(|| anyhow!("a column is of table {at}, which there is not"))
    }
}

fn single_spaced(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A name as SQL takes it: plain where it can be.
fn quoted(name: &str) -> String {
    let is_plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        && name.chars().next().is_some_and(|c| !c.is_ascii_digit());
    if is_plain { name.to_string() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

/// A query without its closing semicolon and with single spaces; what stands in quotes stays.
fn tidy_query(query: &str) -> String {
    let mut tidy = String::with_capacity(query.len());
    let mut quote = None;
    for c in query.trim().trim_end_matches(|c: char| c == ';' || c.is_whitespace()).chars() {
        match quote {
            Some(open) if c == open => quote = None,
            None if matches!(c, '\'' | '"' | '`') => quote = Some(c),
            None if c.is_whitespace() => {
                if !tidy.ends_with(' ') {
                    tidy.push(' ');
                }
                continue;
            }
            _ => {}
        }
        tidy.push(c);
    }
    tidy
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    const TABLES: &str = r#"[{"db_id": "shop", "table_names": [], "table_names_original": ["item", "order line"],
        "column_names": [], "column_names_original": [[-1, "*"], [0, "id"], [0, "Price (EUR)"], [1, "item_id"], [1, "2nd"]],
        "column_types": ["text", "number", "number", "number", "text"],
        "primary_keys": [1, [3, 4]], "foreign_keys": [[3, 1]]}]"#;

    fn schemas(text: &str) -> Result<Schemas> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), text)?;
        Schemas::read(file.path())
    }

    #[test]
    fn a_schema_has_tables_columns_types_and_keys() {
        assert_eq!(
            schemas(TABLES).unwrap().get("shop").unwrap(),
            "CREATE TABLE item (id number, \"Price (EUR)\" number, PRIMARY KEY (id));\n\
             CREATE TABLE \"order line\" (item_id number, \"2nd\" text, PRIMARY KEY (item_id, \"2nd\"), \
             FOREIGN KEY (item_id) REFERENCES item(id));"
        );
    }

    #[test]
    fn sqlite_accepts_the_schema() {
        let schemas = schemas(TABLES).unwrap();
        let database = rusqlite::Connection::open_in_memory().unwrap();
        database.execute_batch(schemas.get("shop").unwrap()).unwrap();
    }

    #[test]
    fn a_key_to_nowhere_and_an_unknown_database_are_told() {
        let text = crate::error::render(&schemas(&TABLES.replace("[[3, 1]]", "[[3, 9]]")).unwrap_err());
        assert!(text.contains("database `shop`") && text.contains("column 9"), "{text}");
        let text = crate::error::render(&schemas(&TABLES.replace("[[3, 1]]", "[[3, 0]]")).unwrap_err());
        assert!(text.contains("`*`, which is no column"), "{text}");
        let text = crate::error::render(&schemas(TABLES).unwrap().prompt("other", "q").unwrap_err());
        assert!(text.contains("database `other` is not in"), "{text}");
    }

    #[test]
    fn queries_are_tidied_outside_of_quotes_only() {
        assert_eq!(tidy_query("SELECT  a ,\n b FROM t ; "), "SELECT a , b FROM t");
        assert_eq!(tidy_query("SELECT 'a  b;' , \"x  'y\""), "SELECT 'a  b;' , \"x  'y\"");
        assert_eq!(tidy_query("SELECT 'it''s  ok'  ;;"), "SELECT 'it''s  ok'");
        assert_eq!(tidy_query(" ; "), "");
    }
}
