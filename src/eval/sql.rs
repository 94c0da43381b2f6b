//! SQL as text: where its words are, what a comparison leaves out, and how it is taken out of an answer.

use std::ops::Range;

/// A piece of SQL that matters to us.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    /// A bare word: keyword, name or number.
    Word(Range<usize>),
    /// A `;`.
    End(usize),
    /// Any other character that is no white space and no part of a comment, and a quoted text as a whole.
    Other,
}

/// Splits SQL into words and the rest; quoted texts and comments are never looked into.
fn pieces(sql: &str) -> Vec<Piece> {
    let bytes = sql.as_bytes();
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &sql[at..];
        let length = match bytes[at] {
            quote @ (b'\'' | b'"' | b'`') => {
                pieces.push(Piece::Other);
                quoted(rest, quote)
            }
            b'[' => {
                pieces.push(Piece::Other);
                rest.find(']').map_or(rest.len(), |end| end + 1)
            }
            b'-' if rest.starts_with("--") => rest.find('\n').unwrap_or(rest.len()),
            b'/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
            b';' => {
                pieces.push(Piece::End(at));
                1
            }
            byte if is_word(byte) => {
                let length = rest.bytes().take_while(|byte| is_word(*byte)).count();
                pieces.push(Piece::Word(at..at + length));
                length
            }
            byte if byte.is_ascii_whitespace() => 1,
            _ => {
                pieces.push(Piece::Other);
                1
            }
        };
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

fn is(sql: &str, piece: Option<&Piece>, word: &str) -> bool {
    matches!(piece, Some(Piece::Word(range)) if sql[range.clone()].eq_ignore_ascii_case(word))
}

/// The query without its `DISTINCT`s, as Spider's own evaluation compares queries.
/// The operator `IS DISTINCT FROM` stays.
pub fn without_distinct(sql: &str) -> String {
    let pieces = pieces(sql);
    let mut kept = String::with_capacity(sql.len());
    let mut copied = 0;
    for (index, piece) in pieces.iter().enumerate() {
        let Piece::Word(range) = piece else { continue };
        if is(sql, Some(piece), "distinct") && !is(sql, pieces.get(index + 1), "from") {
            kept.push_str(&sql[copied..range.start]);
            copied = range.end;
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
    let text =
        match pieces(text).iter().find_map(|piece| if let Piece::End(at) = piece { Some(*at) } else { None })
        {
            Some(end) => &text[..end],
            None => text,
        };
    text.trim().to_string()
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
    fn distinct_is_left_out_but_not_in_texts() {
        for (sql, expected) in [
            ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
            ("select count(distinct a), b from t", "select count( a), b from t"),
            ("SELECT 'DISTINCT' FROM t", "SELECT 'DISTINCT' FROM t"),
            ("SELECT \"it''s distinct\" FROM t", "SELECT \"it''s distinct\" FROM t"),
            ("SELECT a IS NOT DISTINCT FROM b", "SELECT a IS NOT DISTINCT FROM b"),
            ("SELECT distinctly FROM t -- distinct", "SELECT distinctly FROM t -- distinct"),
            ("SELECT 'open distinct", "SELECT 'open distinct"),
            ("", ""),
        ] {
            assert_eq!(without_distinct(sql), expected);
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
