//! SQL as text: where its words are, what a comparison leaves out, and how it is taken out of an answer.

use std::ops::Range;

/// A piece of SQL; white space and comments lie between.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    kind: Kind,
    range: Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A bare word: keyword, name or number.
    Word,
    /// A quoted text or name as a whole.
    Quoted,
    /// Any other character.
    Mark,
}

/// A piece of SQL, for those who count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    /// A bare word: keyword, name or number.
    Word(&'a str),
    /// A quoted text or name.
    Quoted,
    /// Any other character that is no white space.
    Mark(&'a str),
}

/// Splits SQL into its tokens; quoted texts and comments are never looked into.
pub fn tokens(sql: &str) -> Vec<Token<'_>> {
    let token = |piece: Piece| match piece.kind {
        Kind::Word => Token::Word(&sql[piece.range]),
        Kind::Quoted => Token::Quoted,
        Kind::Mark => Token::Mark(&sql[piece.range]),
    };
    pieces(sql).into_iter().map(token).collect()
}

fn pieces(sql: &str) -> Vec<Piece> {
    let bytes = sql.as_bytes();
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &sql[at..];
        let (kind, length) = match bytes[at] {
            quote @ (b'\'' | b'"' | b'`') => (Some(Kind::Quoted), quoted(rest, quote)),
            b'[' => (Some(Kind::Quoted), rest.find(']').map_or(rest.len(), |end| end + 1)),
            b'-' if rest.starts_with("--") => (None, rest.find('\n').unwrap_or(rest.len())),
            b'/' if rest.starts_with("/*") => (None, rest.find("*/").map_or(rest.len(), |end| end + 2)),
            byte if is_word(byte) => {
                (Some(Kind::Word), rest.bytes().take_while(|byte| is_word(*byte)).count())
            }
            byte if byte.is_ascii_whitespace() => (None, 1),
            _ => (Some(Kind::Mark), 1),
        };
        pieces.extend(kind.map(|kind| Piece { kind, range: at..at + length }));
        at += length;
    }
    pieces
}

/// Every byte of a character beyond ASCII counts as a word's, as in SQLite: so no cut falls inside one.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

/// Length of the quoted text that `rest` begins with; a doubled quote stands for itself.
fn quoted(rest: &str, quote: u8) -> usize {
    let bytes = rest.as_bytes();
    let mut at = 1;
    while at < bytes.len() {
        if bytes[at] != quote {
            at += 1;
        } else if bytes.get(at + 1) == Some(&quote) {
            at += 2;
        } else {
            return at + 1;
        }
    }
    rest.len()
}

fn is(sql: &str, piece: Option<&Piece>, text: &str) -> bool {
    piece.is_some_and(|one| one.kind != Kind::Quoted && sql[one.range.clone()].eq_ignore_ascii_case(text))
}

/// The query as Spider's own evaluation runs it: without its `DISTINCT`s, with `> =` as one operator, and with
/// the year 2020 for `YEAR(CURDATE())`. The operator `IS DISTINCT FROM` stays.
pub fn as_evaluated(sql: &str) -> String {
    let pieces = pieces(sql);
    let are = |start: usize, texts: &[&str]| {
        texts.iter().enumerate().all(|(at, text)| is(sql, pieces.get(start + at), text))
    };
    let mut kept = String::with_capacity(sql.len());
    let mut copied = 0;
    for (at, piece) in pieces.iter().enumerate() {
        let Range { start, end } = piece.range;
        if start < copied {
            continue;
        }
        let replaced = if are(at, &["distinct"]) && !are(at + 1, &["from"]) {
            Some((end, ""))
        } else if are(at, &["year", "(", "curdate", "(", ")", ")"]) {
            Some((pieces[at + 5].range.end, "2020"))
        } else if ["<", ">", "!"].iter().any(|mark| are(at, &[mark, "="])) && sql[end..].starts_with(" =") {
            Some((end + 1, &sql[start..end]))
        } else {
            None
        };
        if let Some((next, text)) = replaced {
            kept.push_str(&sql[copied..start]);
            kept.push_str(text);
            copied = next;
        }
    }
    kept.push_str(&sql[copied..]);
    kept
}

/// Whether the order of the rows is part of the answer: there is an `ORDER BY`.
pub fn orders_rows(sql: &str) -> bool {
    pieces(sql).windows(2).any(|pair| is(sql, pair.first(), "order") && is(sql, pair.get(1), "by"))
}

/// The query in a model's answer: out of a code fence when there is one, from the first line that begins
/// with `SELECT` or `WITH`, up to the first `;` or empty line. An answer without any is taken whole.
pub fn extract(answer: &str) -> String {
    let text = fenced(answer).unwrap_or_else(|| from_query(answer));
    let end = pieces(text).into_iter().find(|piece| is(text, Some(piece), ";"));
    text[..end.map_or(text.len(), |end| end.range.start)].trim().to_string()
}

/// The inside of the first code fence that holds a query, without the language's name.
fn fenced(answer: &str) -> Option<&str> {
    let (_, inside) = answer.split_once("```")?;
    let inside = inside.split_once("```").map_or(inside, |(inside, _)| inside);
    let start = query_start(inside).or_else(|| inside.find('\n').map(|at| at + 1))?;
    Some(&inside[start..])
}

fn from_query(answer: &str) -> &str {
    let text = query_start(answer).map_or(answer, |start| &answer[start..]).trim_start();
    let paragraph = text.replace("\r\n", "\n").find("\n\n");
    match paragraph {
        // Carriage returns were only folded for the search; a text with some is cut at its own form.
        Some(_) => text.split("\n\n").next().and_then(|first| first.split("\r\n\r\n").next()).unwrap_or(text),
        None => text,
    }
}

/// Where the first line begins that is the start of a query.
fn query_start(text: &str) -> Option<usize> {
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim_start();
        let word: String = trimmed.chars().take_while(|letter| letter.is_ascii_alphabetic()).collect();
        if ["select", "with"].iter().any(|start| word.eq_ignore_ascii_case(start)) {
            return Some(at + line.len() - trimmed.len());
        }
        at += line.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_run_as_the_evaluation_does() {
        for (sql, expected) in [
            ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
            ("select count(distinct a), b from t", "select count( a), b from t"),
            ("SELECT 'DISTINCT' FROM t", "SELECT 'DISTINCT' FROM t"),
            ("SELECT \"it''s distinct\" FROM t", "SELECT \"it''s distinct\" FROM t"),
            ("SELECT a IS NOT DISTINCT FROM b", "SELECT a IS NOT DISTINCT FROM b"),
            ("SELECT distinctly FROM t -- distinct", "SELECT distinctly FROM t -- distinct"),
            ("SELECT 'open distinct", "SELECT 'open distinct"),
            ("SELECT a WHERE b > = 1 AND c ! = 2 AND d < 3", "SELECT a WHERE b >= 1 AND c != 2 AND d < 3"),
            ("SELECT '> =' WHERE a >  = 1", "SELECT '> =' WHERE a >  = 1"),
            ("SELECT year( CURDATE ( ) ) - a", "SELECT 2020 - a"),
            ("SELECT year(a), 'größe', größe", "SELECT year(a), 'größe', größe"),
            ("", ""),
        ] {
            assert_eq!(as_evaluated(sql), expected);
        }
    }

    #[test]
    fn order_by_is_seen_across_white_space_and_not_in_texts() {
        assert!(orders_rows("SELECT a FROM t ORDER  \n BY a"));
        assert!(orders_rows("select a from t order by a desc limit 1"));
        assert!(!orders_rows("SELECT 'order by' FROM t"));
        assert!(!orders_rows("SELECT a FROM \"order\" GROUP BY a"));
        assert!(!orders_rows("SELECT a /* order by */ FROM t"));
    }

    #[test]
    fn a_query_is_found_in_an_answer() {
        for (answer, expected) in [
            ("SELECT 1", "SELECT 1"),
            ("  select 1 ; drop table t", "select 1"),
            ("```sql\nSELECT a\nFROM t;\n```\nThis counts.", "SELECT a\nFROM t"),
            ("Here:\n```\nWITH x AS (SELECT 1) SELECT * FROM x\n```", "WITH x AS (SELECT 1) SELECT * FROM x"),
            ("The query is:\nSELECT ';' FROM t\n\nIt gives a semicolon.", "SELECT ';' FROM t"),
            ("SELECT 1\r\n\r\nDone.", "SELECT 1"),
            ("```SELECT 1```", "SELECT 1"),
            ("I do not know", "I do not know"),
            ("Selected: nothing", "Selected: nothing"),
            ("SELECT 'grün' FROM größe; x", "SELECT 'grün' FROM größe"),
            ("", ""),
            ("DELETE FROM t", "DELETE FROM t"),
        ] {
            assert_eq!(extract(answer), expected, "{answer:?}");
        }
    }
}
