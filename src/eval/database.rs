//! Running queries that a model wrote: read-only, behind an authorizer, with limits of time, rows and size.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use thiserror::Error;

use super::result_set::{ResultSet, Value};

/// What a query may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryLimits {
    /// Longest run.
    pub time: Duration,
    /// Most rows of a result.
    pub rows: usize,
}

impl Default for QueryLimits {
    /// Thirty seconds and 100,000 rows: the largest gold result of Spider's development set has 1,860.
    fn default() -> Self {
        Self { time: Duration::from_secs(30), rows: 100_000 }
    }
}

/// Longest text or blob a query may make, in bytes: SQLite's own limit would allow a gigabyte.
const VALUE_BYTES: i32 = 16 << 20;

/// Instructions of SQLite's machine between two looks at the clock.
const STEPS_BETWEEN_LOOKS: i32 = 10_000;

/// Why a query gave no result.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum QueryError {
    /// It is no SQL of this schema; SQLite's own words.
    #[error("{0}")]
    Failed(String),
    /// It would do something other than read.
    #[error("only reading is allowed: {0}")]
    NotReading(String),
    /// It took too long.
    #[error("longer than {0:?}")]
    TimedOut(Duration),
    /// It gave too much.
    #[error("more than {0} rows")]
    TooManyRows(usize),
}

/// A SQLite file, open for reading and nothing else.
#[derive(Debug)]
pub struct Database {
    connection: Connection,
    limits: QueryLimits,
    /// When the query that runs must end.
    deadline: Arc<Mutex<Option<Instant>>>,
}

impl Database {
    /// Opens a file.
    ///
    /// # Errors
    /// When it is missing or no SQLite database.
    pub fn open(path: &Path, limits: QueryLimits) -> Result<Self> {
        Self::guarded(path, limits).with_context(|| format!("cannot open database `{}`", path.display()))
    }

    fn guarded(path: &Path, limits: QueryLimits) -> rusqlite::Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags)?;
        // Opening reads nothing: this is where a file that is no database is found out.
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, VALUE_BYTES)?;
        connection.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0)?;
        connection.pragma_update(None, "query_only", true)?;
        connection.authorizer(Some(authorize))?;
        let deadline = Arc::new(Mutex::new(None));
        let clock = Arc::clone(&deadline);
        connection.progress_handler(STEPS_BETWEEN_LOOKS, Some(move || is_over(&clock)))?;
        Ok(Self { connection, limits, deadline })
    }

    /// Whether any table has a row; without one every query answers alike.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn has_rows(&self) -> Result<bool> {
        let names =
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!'";
        let mut statement = self.connection.prepare(names)?;
        let tables = statement.query_map([], |row| row.get::<_, String>(0))?;
        for table in tables {
            let quoted = table?.replace('"', "\"\"");
            let any = format!("SELECT EXISTS (SELECT 1 FROM \"{quoted}\")");
            if self.connection.query_row(&any, [], |row| row.get::<_, bool>(0))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Runs one query.
    ///
    /// # Errors
    /// See [`QueryError`]; nothing is ever written.
    pub fn query(&self, sql: &str) -> Result<ResultSet, QueryError> {
        self.set_deadline(Some(Instant::now() + self.limits.time));
        let result = self.read(sql);
        self.set_deadline(None);
        result
    }

    fn read(&self, sql: &str) -> Result<ResultSet, QueryError> {
        let told = |error| self.told(&error);
        let mut statement = self.connection.prepare(sql).map_err(told)?;
        if !statement.readonly() {
            return Err(QueryError::NotReading(sql.to_string()));
        }
        let columns = statement.column_count();
        if columns == 0 {
            return Err(QueryError::Failed("there is no query".to_string()));
        }
        let mut rows = statement.query([]).map_err(told)?;
        let mut read = Vec::new();
        while let Some(row) = rows.next().map_err(told)? {
            if read.len() == self.limits.rows {
                return Err(QueryError::TooManyRows(self.limits.rows));
            }
            let values = (0..columns).map(|column| row.get_ref(column).map(value_of));
            read.push(values.collect::<rusqlite::Result<Vec<Value>>>().map_err(told)?);
        }
        Ok(ResultSet { columns, rows: read })
    }

    fn told(&self, error: &rusqlite::Error) -> QueryError {
        match error.sqlite_error_code() {
            Some(ErrorCode::OperationInterrupted) => QueryError::TimedOut(self.limits.time),
            Some(ErrorCode::AuthorizationForStatementDenied | ErrorCode::ReadOnly) => {
                QueryError::NotReading(error.to_string())
            }
            _ => QueryError::Failed(error.to_string()),
        }
    }

    fn set_deadline(&self, deadline: Option<Instant>) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }
}

fn is_over(deadline: &Mutex<Option<Instant>>) -> bool {
    deadline.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|end| Instant::now() > end)
}

/// Reading, calling functions and recursive queries; everything else is denied when the query is compiled.
fn authorize(context: AuthContext<'_>) -> Authorization {
    match context.action {
        AuthAction::Function { function_name } if function_name.eq_ignore_ascii_case("load_extension") => {
            Authorization::Deny
        }
        AuthAction::Select
        | AuthAction::Read { .. }
        | AuthAction::Function { .. }
        | AuthAction::Recursive => Authorization::Allow,
        _ => Authorization::Deny,
    }
}

fn value_of(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Integer(number),
        ValueRef::Real(number) => Value::Real(number),
        ValueRef::Text(bytes) => Value::Text(bytes.to_vec()),
        ValueRef::Blob(bytes) => Value::Blob(bytes.to_vec()),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    fn file() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let connection = Connection::open(folder.path().join("a.sqlite")).unwrap();
        connection
            .execute_batch(
                "CREATE TABLE t (a INTEGER, \"b \"\" c\" TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y');",
            )
            .unwrap();
        folder
    }

    fn open(folder: &tempfile::TempDir, limits: QueryLimits) -> Database {
        Database::open(&folder.path().join("a.sqlite"), limits).unwrap()
    }

    #[test]
    fn queries_give_columns_and_rows() {
        let folder = file();
        let result = open(&folder, QueryLimits::default()).query("SELECT a, 0.5 FROM t ORDER BY a").unwrap();
        assert_eq!(result.columns, 2);
        assert_eq!(
            result.rows,
            [[Value::Integer(1), Value::Real(0.5)], [Value::Integer(2), Value::Real(0.5)]]
        );
    }

    #[test]
    fn nothing_is_written() {
        let folder = file();
        let path = folder.path().join("a.sqlite");
        let before = std::fs::read(&path).unwrap();
        let database = open(&folder, QueryLimits::default());
        let elsewhere = folder.path().join("b.sqlite");
        for sql in [
            "DELETE FROM t".to_string(),
            "INSERT INTO t VALUES (3, 'z')".to_string(),
            "UPDATE t SET a = 0".to_string(),
            "DROP TABLE t".to_string(),
            "CREATE TABLE u (a)".to_string(),
            "CREATE TEMP TABLE u (a)".to_string(),
            "PRAGMA query_only = OFF".to_string(),
            "PRAGMA journal_mode = WAL".to_string(),
            "BEGIN".to_string(),
            "VACUUM".to_string(),
            format!("VACUUM INTO '{}'", elsewhere.display()),
            format!("ATTACH '{}' AS other", elsewhere.display()),
            "WITH x AS (SELECT 1) DELETE FROM t".to_string(),
        ] {
            let error = database.query(&sql).unwrap_err();
            assert!(matches!(error, QueryError::NotReading(_)), "{sql}: {error}");
        }
        for sql in ["SELECT load_extension('x')", "SELECT 1; DROP TABLE t"] {
            assert!(database.query(sql).is_err(), "{sql}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert!(!elsewhere.exists());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn endless_queries_are_stopped() {
        let folder = file();
        let limits = QueryLimits { time: Duration::from_millis(100), rows: 1000 };
        let database = open(&folder, limits);
        let counting = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT";
        let started = Instant::now();
        assert_eq!(
            database.query(&format!("{counting} count(*) FROM n")),
            Err(QueryError::TimedOut(limits.time))
        );
        assert!(started.elapsed() < Duration::from_secs(5));
        assert_eq!(database.query(&format!("{counting} i FROM n")), Err(QueryError::TooManyRows(1000)));
        // The clock of one query is not the next one's.
        assert_eq!(database.query("SELECT a FROM t").unwrap().rows.len(), 2);
    }

    #[test]
    fn what_is_no_query_is_an_error() {
        let folder = file();
        let database = open(&folder, QueryLimits::default());
        for sql in [
            "SELECT nothing FROM t",
            "I do not know",
            "SELECT ?",
            "SELECT a FROM",
            "",
            " ; ",
            "-- SELECT a FROM t",
            "SELECT zeroblob(900000000)",
        ] {
            assert!(
                matches!(database.query(sql), Err(QueryError::Failed(_))),
                "{sql:?} gave {:?}",
                database.query(sql)
            );
        }
    }

    #[test]
    fn rows_are_found_in_any_table() {
        let folder = file();
        assert!(open(&folder, QueryLimits::default()).has_rows().unwrap());
        let path = folder.path().join("empty.sqlite");
        let connection = Connection::open(&path).unwrap();
        connection
            .execute_batch(
                "CREATE TABLE \"odd \"\" name\" (a INTEGER PRIMARY KEY AUTOINCREMENT); CREATE TABLE u (a);
                 INSERT INTO \"odd \"\" name\" VALUES (1); DELETE FROM \"odd \"\" name\";",
            )
            .unwrap();
        let database = Database::open(&path, QueryLimits::default()).unwrap();
        assert!(!database.has_rows().unwrap());
    }

    #[test]
    fn a_file_that_is_no_database_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sqlite");
        assert!(Database::open(&path, QueryLimits::default()).is_err());
        assert!(!path.exists());
        std::fs::write(&path, "no database at all, but long enough to hold a header of one hundred bytes, which SQLite reads first").unwrap();
        let error = format!("{:#}", Database::open(&path, QueryLimits::default()).unwrap_err());
        assert!(error.contains("a.sqlite") && error.contains("not a database"), "{error}");
    }
}
