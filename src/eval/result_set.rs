//! Whether two result sets are the same answer.
//!
//! Rows are a multiset unless the gold query orders them; columns may come in any order, as in Spider's
//! test-suite evaluation (Zhong et al. 2020). Numbers that differ only by rounding are one number.

use std::collections::{BTreeMap, HashSet};

/// A value of a result.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// No value.
    Null,
    /// A whole number.
    Integer(i64),
    /// A float.
    Real(f64),
    /// A text, in whatever encoding the file has.
    Text(Vec<u8>),
    /// Bytes.
    Blob(Vec<u8>),
}

/// What a query gave.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ResultSet {
    /// Number of columns.
    pub columns: usize,
    /// Rows, each of `columns` values.
    pub rows: Vec<Vec<Value>>,
}

/// Two floats this close, relative to the smaller, differ by the order of a summation and nothing else.
const ROUNDING: f64 = 1e-9;

/// Whether `predicted` answers as `gold` does; with `ordered` the order of rows counts.
pub fn same_answer(gold: &ResultSet, predicted: &ResultSet, ordered: bool) -> bool {
    if gold.rows.len() != predicted.rows.len() {
        return false;
    }
    // Nothing found is one answer, however many columns it has nothing in.
    if gold.rows.is_empty() {
        return true;
    }
    if gold.columns != predicted.columns {
        return false;
    }
    let classes = Classes::of([gold, predicted]);
    let (gold, predicted) = (classes.columns(gold), classes.columns(predicted));
    if ordered { same_columns(gold, predicted) } else { same_rows(&gold, &predicted) }
}

/// With rows in order, a permutation of columns is a multiset of columns.
fn same_columns(mut gold: Vec<Column>, mut predicted: Vec<Column>) -> bool {
    gold.sort_unstable();
    predicted.sort_unstable();
    gold == predicted
}

/// Looks for the order of `predicted`'s columns that makes the rows one multiset.
fn same_rows(gold: &[Column], predicted: &[Column]) -> bool {
    let rows = gold.first().map_or(0, Vec::len);
    let start = Groups { gold: vec![0; rows], predicted: vec![0; rows] };
    match_columns(gold, predicted, &mut vec![false; predicted.len()], &start)
}

/// A column as classes of equal values, one a row.
type Column = Vec<usize>;

/// Rows that agree in all columns matched so far share a number, across both results.
struct Groups {
    gold: Vec<usize>,
    predicted: Vec<usize>,
}

impl Groups {
    /// Adds a column to each side, or `None` when the rows so far are no longer one multiset.
    fn refined(&self, gold: &Column, predicted: &Column) -> Option<Self> {
        let mut numbers = BTreeMap::new();
        let mut counts: Vec<i64> = Vec::new();
        let mut number = |group: &usize, class: &usize, by: i64| {
            let fresh = numbers.len();
            let number = *numbers.entry((*group, *class)).or_insert(fresh);
            if number == counts.len() {
                counts.push(0);
            }
            counts[number] += by;
            number
        };
        let left = self.gold.iter().zip(gold).map(|(group, class)| number(group, class, 1)).collect();
        let right =
            self.predicted.iter().zip(predicted).map(|(group, class)| number(group, class, -1)).collect();
        counts.iter().all(|count| *count == 0).then_some(Self { gold: left, predicted: right })
    }
}

/// Matches the first column of `gold` with each unused one of `predicted`, then the rest; a column that is
/// equal to one tried before is not tried again.
fn match_columns(gold: &[Column], predicted: &[Column], used: &mut Vec<bool>, groups: &Groups) -> bool {
    let Some((first, rest)) = gold.split_first() else { return true };
    let mut tried = HashSet::new();
    for index in 0..predicted.len() {
        if used[index] || !tried.insert(&predicted[index]) {
            continue;
        }
        if let Some(refined) = groups.refined(first, &predicted[index]) {
            used[index] = true;
            if match_columns(rest, predicted, used, &refined) {
                return true;
            }
            used[index] = false;
        }
    }
    false
}

/// Numbers every value of both results, equal values alike: what follows compares numbers exactly, so
/// that equality is transitive although floats are compared with tolerance.
struct Classes {
    /// Sorted; a number belongs to the class of the last bound that is not above it.
    bounds: Vec<Number>,
    other: BTreeMap<Other, usize>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Number {
    Integer(i64),
    Real(f64),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Other {
    Null,
    Text(Vec<u8>),
    Blob(Vec<u8>),
}

impl Number {
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Integer(number) => Some(Self::Integer(*number)),
            Value::Real(number) => Some(Self::Real(*number)),
            _ => None,
        }
    }

    fn as_f64(self) -> f64 {
        match self {
            Self::Integer(number) => number as f64,
            Self::Real(number) => number,
        }
    }

    /// A total order: by size, then whole numbers by their exact value, before floats of the same size.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let exact = |number: &Self| match number {
            Self::Integer(number) => (false, *number),
            Self::Real(_) => (true, 0),
        };
        self.as_f64().total_cmp(&other.as_f64()).then_with(|| exact(self).cmp(&exact(other)))
    }

    /// Whole numbers are compared exactly: two large identifiers are not the same for being close.
    fn is_close(&self, other: &Self) -> bool {
        if let (Self::Integer(a), Self::Integer(b)) = (self, other) {
            return a == b;
        }
        let (a, b) = (self.as_f64(), other.as_f64());
        a == b || (a - b).abs() <= ROUNDING * a.abs().min(b.abs())
    }
}

impl Classes {
    fn of(results: [&ResultSet; 2]) -> Self {
        let values = || results.into_iter().flat_map(|result| result.rows.iter().flatten());
        let mut numbers: Vec<Number> = values().filter_map(Number::of).collect();
        numbers.sort_unstable_by(Number::order);
        let mut bounds: Vec<Number> = Vec::new();
        let mut last: Option<Number> = None;
        for number in numbers {
            if !last.is_some_and(|last| last.is_close(&number)) {
                bounds.push(number);
            }
            last = Some(number);
        }
        let mut other = BTreeMap::new();
        for value in values().filter_map(Other::of) {
            let class = bounds.len() + other.len();
            other.entry(value).or_insert(class);
        }
        Self { bounds, other }
    }

    fn class(&self, value: &Value) -> usize {
        match (Number::of(value), Other::of(value)) {
            (Some(number), _) => self.bounds.partition_point(|bound| bound.order(&number).is_le()),
            // Classes of numbers are counted from 1 by the search above, so these begin after them.
            (None, Some(other)) => 1 + self.other.get(&other).copied().unwrap_or(0),
            (None, None) => 0,
        }
    }

    /// The result column by column, each value as its class.
    fn columns(&self, result: &ResultSet) -> Vec<Column> {
        (0..result.columns)
            .map(|column| result.rows.iter().map(|row| self.class(&row[column])).collect())
            .collect()
    }
}

impl Other {
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Null => Some(Self::Null),
            Value::Text(bytes) => Some(Self::Text(bytes.clone())),
            Value::Blob(bytes) => Some(Self::Blob(bytes.clone())),
            Value::Integer(_) | Value::Real(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(rows: &[&[Value]]) -> ResultSet {
        ResultSet {
            columns: rows.first().map_or(1, |row| row.len()),
            rows: rows.iter().map(|row| row.to_vec()).collect(),
        }
    }

    fn int(number: i64) -> Value {
        Value::Integer(number)
    }

    fn real(number: f64) -> Value {
        Value::Real(number)
    }

    fn text(text: &str) -> Value {
        Value::Text(text.as_bytes().to_vec())
    }

    fn both(gold: &ResultSet, predicted: &ResultSet) -> (bool, bool) {
        assert_eq!(same_answer(gold, predicted, true), same_answer(predicted, gold, true));
        assert_eq!(same_answer(gold, predicted, false), same_answer(predicted, gold, false));
        (same_answer(gold, predicted, true), same_answer(gold, predicted, false))
    }

    #[test]
    fn the_order_of_rows_counts_only_when_asked() {
        let gold = set(&[&[int(1), text("a")], &[int(2), text("b")]]);
        assert_eq!(both(&gold, &gold.clone()), (true, true));
        assert_eq!(both(&gold, &set(&[&[int(2), text("b")], &[int(1), text("a")]])), (false, true));
    }

    #[test]
    fn rows_are_a_multiset_not_a_set() {
        let gold = set(&[&[int(1)], &[int(1)], &[int(2)]]);
        assert_eq!(both(&gold, &set(&[&[int(1)], &[int(2)], &[int(2)]])), (false, false));
        assert_eq!(both(&gold, &set(&[&[int(1)], &[int(2)]])), (false, false));
    }

    #[test]
    fn columns_may_be_permuted_but_rows_must_hold_together() {
        let gold = set(&[&[int(1), int(2), text("x")], &[int(2), int(1), text("y")]]);
        assert_eq!(
            both(&gold, &set(&[&[text("x"), int(1), int(2)], &[text("y"), int(2), int(1)]])),
            (true, true)
        );
        // Each column holds the same values, but no order of columns makes the rows the same.
        let other = set(&[&[int(1), int(1), text("x")], &[int(2), int(2), text("y")]]);
        assert_eq!(both(&gold, &other), (false, false));
        assert_eq!(both(&gold, &set(&[&[int(1), int(2)], &[int(2), int(1)]])), (false, false));
    }

    #[test]
    fn many_equal_columns_are_no_search() {
        let row = vec![int(1); 40];
        let gold = ResultSet { columns: 40, rows: vec![row.clone(); 3] };
        let mut other = gold.clone();
        other.rows[2][39] = int(2);
        assert_eq!(both(&gold, &gold.clone()), (true, true));
        assert_eq!(both(&gold, &other), (false, false));
    }

    #[test]
    fn rounding_is_forgiven_and_nothing_else() {
        let gold = set(&[&[real(0.1 + 0.2)], &[real(1e9)]]);
        assert_eq!(both(&gold, &set(&[&[real(0.3)], &[int(1_000_000_000)]])), (true, true));
        assert_eq!(both(&gold, &set(&[&[real(0.300_001)], &[int(1_000_000_000)]])), (false, false));
        let ids = set(&[&[int(9_007_199_254_740_993)]]);
        assert_eq!(both(&ids, &set(&[&[int(9_007_199_254_740_992)]])), (false, false));
        assert_eq!(both(&set(&[&[int(3)]]), &set(&[&[real(3.0)]])), (true, true));
        assert_eq!(both(&set(&[&[real(0.0)]]), &set(&[&[real(-0.0)]])), (true, true));
        assert_eq!(both(&set(&[&[real(f64::INFINITY)]]), &set(&[&[real(1e308)]])), (false, false));
    }

    #[test]
    fn kinds_are_told_apart() {
        for (a, b) in [
            (int(1), text("1")),
            (Value::Null, int(0)),
            (Value::Null, text("")),
            (text("a"), text("A")),
            (text("a"), Value::Blob(b"a".to_vec())),
        ] {
            assert_eq!(both(&set(&[&[a]]), &set(&[&[b]])), (false, false));
        }
        assert_eq!(both(&set(&[&[Value::Null]]), &set(&[&[Value::Null]])), (true, true));
    }

    #[test]
    fn nothing_found_is_one_answer() {
        let none = ResultSet { columns: 1, rows: vec![] };
        assert_eq!(both(&none, &ResultSet { columns: 2, rows: vec![] }), (true, true));
        assert_eq!(both(&none, &set(&[&[int(0)]])), (false, false));
    }
}
