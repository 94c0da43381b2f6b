//! How hard a query of Spider is, by the rules of its evaluation (Yu et al. 2018): what its outermost query is
//! made of is counted, in three groups.
//!
//! The rules are those of the published evaluation script, its oddities included: a `NOT` before a condition and
//! a connective in `HAVING` count as aggregates, and queries in `FROM` do not count as nested.

use std::fmt;

use super::sql::{Token, tokens};

/// The four classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hardness {
    /// One clause at most.
    Easy,
    /// Some more.
    Medium,
    /// Several, or one nested query.
    Hard,
    /// What is beyond.
    Extra,
}

impl Hardness {
    /// Of a query.
    pub fn of(sql: &str) -> Self {
        let Counts { clauses, nested, others } = Counts::of(sql);
        match (clauses, others, nested) {
            (0..=1, 0, 0) => Self::Easy,
            (0..=1, 0..=2, 0) | (0..=2, 0..=1, 0) => Self::Medium,
            (0..=2, 3.., 0) | (3, 0..=2, 0) | (0..=1, 0, 0..=1) => Self::Hard,
            _ => Self::Extra,
        }
    }
}

impl fmt::Display for Hardness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Easy => "easy",
            Self::Medium => "medium",
            Self::Hard => "hard",
            Self::Extra => "extra",
        })
    }
}

/// The three groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counts {
    /// `WHERE`, `GROUP BY`, `ORDER BY`, `LIMIT`, joins, `OR`, `LIKE`.
    clauses: usize,
    /// Nested and combined queries.
    nested: usize,
    /// More than one aggregate, column, condition, or column of a group.
    others: usize,
}

/// The clauses of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clause {
    Select,
    From,
    Where,
    Group,
    Having,
    Order,
    Limit,
}

impl Clause {
    fn of(word: &str) -> Option<Self> {
        Some(match word {
            "select" => Self::Select,
            "from" => Self::From,
            "where" => Self::Where,
            "group" => Self::Group,
            "having" => Self::Having,
            "order" => Self::Order,
            "limit" => Self::Limit,
            _ => return None,
        })
    }
}

/// The outermost query, clause by clause: each holds what stands outside of all brackets, and a nested query as `None`.
type Parts = Vec<(Clause, Vec<Option<String>>)>;

impl Counts {
    fn of(sql: &str) -> Self {
        let (parts, combined) = outermost(sql);
        let of =
            |clause: Clause| parts.iter().filter(move |(one, _)| *one == clause).flat_map(|(_, words)| words);
        let has = |clause: Clause| usize::from(parts.iter().any(|(one, _)| *one == clause));
        let count =
            |clause: Clause, word: &str| of(clause).filter(|one| one.as_deref() == Some(word)).count();
        let conditions = [Clause::From, Clause::Where, Clause::Having];
        let in_conditions = |word: &str| conditions.iter().map(|clause| count(*clause, word)).sum::<usize>();
        let nested = conditions.iter().map(|clause| nested_in(*clause, of(*clause))).sum::<usize>();
        // The `AND` of a `BETWEEN` is none; a query that was cut off has the one without the other.
        let connectives = |clause: Clause| {
            count(clause, "or") + count(clause, "and").saturating_sub(count(clause, "between"))
        };
        let aggregates = columns(of(Clause::Select)).iter().filter(|column| is_aggregate(column)).count()
            + of(Clause::Order).filter(|one| one.as_deref().is_some_and(is_aggregate_name)).count()
            + count(Clause::Where, "not")
            + count(Clause::Having, "not")
            + connectives(Clause::Having);
        let more_than_one = [
            aggregates,
            columns(of(Clause::Select)).len(),
            has(Clause::Where) * (1 + connectives(Clause::Where)),
            has(Clause::Group) * columns(of(Clause::Group)).len(),
        ];
        Self {
            clauses: has(Clause::Where)
                + has(Clause::Group)
                + has(Clause::Order)
                + has(Clause::Limit)
                + count(Clause::From, "join")
                + in_conditions("or")
                + in_conditions("like"),
            nested: nested + usize::from(combined),
            others: more_than_one.into_iter().filter(|count| *count > 1).count(),
        }
    }
}

/// The clauses of the outermost query, up to an `INTERSECT`, `UNION` or `EXCEPT`, or to the end of the statement; whether
/// it is combined with another by one of these.
fn outermost(sql: &str) -> (Parts, bool) {
    let (mut parts, mut depth): (Parts, usize) = (Vec::new(), 0);
    let tokens = tokens(sql);
    for (at, token) in tokens.iter().enumerate() {
        let text = match token {
            Token::Word(word) => word.to_ascii_lowercase(),
            Token::Quoted => "''".to_string(),
            Token::Mark(mark) => mark.to_string(),
        };
        let nested = text == "("
            && matches!(tokens.get(at + 1), Some(Token::Word(word)) if word.eq_ignore_ascii_case("select"));
        match text.as_str() {
            "(" => depth += 1,
            ")" => depth = depth.saturating_sub(1),
            "intersect" | "union" | "except" if depth == 0 => return (parts, true),
            ";" if depth == 0 => return (parts, false),
            _ => {}
        }
        if depth == 0
            && let Some(clause) = Clause::of(&text)
        {
            parts.push((clause, Vec::new()));
        } else if let Some((_, words)) = parts.last_mut() {
            if nested && depth == 1 {
                words.push(None);
            } else if depth == 0 {
                words.push(Some(text));
            }
        }
    }
    (parts, false)
}

/// Nested queries; in `FROM` only those of the conditions of joins, which begin with the first `ON`.
fn nested_in<'a>(clause: Clause, words: impl Iterator<Item = &'a Option<String>>) -> usize {
    let mut conditions = clause != Clause::From;
    words
        .filter(|word| {
            conditions |= word.as_deref() == Some("on");
            conditions && word.is_none()
        })
        .count()
}

/// The parts between commas.
fn columns<'a>(words: impl Iterator<Item = &'a Option<String>>) -> Vec<Vec<&'a str>> {
    let words: Vec<&str> = words.map(|word| word.as_deref().unwrap_or("select")).collect();
    words.split(|word| *word == ",").map(<[&str]>::to_vec).collect()
}

fn is_aggregate(column: &[&str]) -> bool {
    column.iter().find(|word| **word != "distinct").is_some_and(|word| is_aggregate_name(word))
}

fn is_aggregate_name(word: &str) -> bool {
    ["max", "min", "count", "sum", "avg"].contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clauses_conditions_and_nesting_decide() {
        for (sql, expected) in [
            ("SELECT count(*) FROM t", Hardness::Easy),
            ("SELECT a FROM t WHERE b = 'x or y'", Hardness::Easy),
            ("SELECT a, b FROM t WHERE c = 1", Hardness::Medium),
            ("SELECT a FROM t JOIN u ON t.x = u.x WHERE b = 1", Hardness::Medium),
            ("SELECT a FROM t WHERE b BETWEEN 1 AND 2", Hardness::Easy),
            ("SELECT a FROM t WHERE b BETWEEN 1", Hardness::Easy),
            ("SELECT a FROM t; SELECT a, b FROM u WHERE c = 1", Hardness::Easy),
            ("SELECT a FROM t WHERE b = ';' LIMIT 1;", Hardness::Medium),
            ("SELECT a, b FROM t WHERE c = 1 AND d = 2 ORDER BY a", Hardness::Extra),
            ("SELECT a, b FROM t GROUP BY a ORDER BY count(*) LIMIT 1", Hardness::Hard),
            ("SELECT a FROM t WHERE b IN (SELECT c FROM u WHERE d = 1)", Hardness::Hard),
            ("SELECT a FROM t UNION SELECT b FROM u", Hardness::Hard),
            ("SELECT count(*) FROM (SELECT a FROM t UNION SELECT b FROM u)", Hardness::Easy),
            ("SELECT a FROM t WHERE b LIKE '%x%' OR c LIKE '%y%'", Hardness::Extra),
            ("", Hardness::Easy),
        ] {
            assert_eq!(Hardness::of(sql), expected, "{sql}: {:?}", Counts::of(sql));
        }
    }
}
