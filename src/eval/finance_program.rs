//! The programs of FinQA and ConvFinQA (Chen et al. 2021, 2022), executed as their own evaluation does.
//!
//! A program is a number, or steps such as `subtract(5829, 5735), divide(#0, 5735)`: `#0` is what the first step
//! gave. The result is rounded to five places and then compared exactly.

use thiserror::Error;

/// What a program gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// A number, rounded to five places.
    Number(f64),
    /// What `greater` says.
    Yes(bool),
}

/// Why a program gives nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProgramError {
    /// It is none.
    #[error("`{0}` is no step of a program")]
    NotAStep(String),
    /// An argument is no number.
    #[error("`{0}` is no number")]
    NotANumber(String),
    /// An argument refers to a step that is not there.
    #[error("`{0}` refers to no step before it")]
    NoSuchStep(String),
    /// The table has no such row.
    #[error("the table has no row `{0}`")]
    NoSuchRow(String),
    /// Division by zero, or a number beyond all bounds.
    #[error("`{0}` gives no number")]
    Undefined(String),
}

/// The operations, as models may write them.
const OPERATIONS: [&str; 10] = [
    "add",
    "subtract",
    "multiply",
    "divide",
    "exp",
    "greater",
    "table_max",
    "table_min",
    "table_sum",
    "table_average",
];

/// Whether a text begins as a program of steps does.
pub fn begins(text: &str) -> bool {
    let text = text.trim_start();
    OPERATIONS
        .iter()
        .any(|name| text.strip_prefix(name).is_some_and(|rest| rest.trim_start().starts_with('(')))
}

/// Executes a program; `table` holds rows of cells, the first of each its name.
///
/// # Errors
/// See [`ProgramError`].
pub fn execute(program: &str, table: &[Vec<String>]) -> Result<Outcome, ProgramError> {
    let program = program.trim();
    if !program.contains('(') {
        let number = number_of(program).ok_or_else(|| ProgramError::NotANumber(program.to_string()))?;
        return Ok(Outcome::Number(rounded(number)));
    }
    let mut results: Vec<Value> = Vec::new();
    for step in steps(program)? {
        let result = step.run(&results, table)?;
        results.push(result);
    }
    match results.last() {
        Some(Value::Number(number)) => Ok(Outcome::Number(rounded(*number))),
        Some(Value::Text(text)) if text == YES => Ok(Outcome::Yes(true)),
        Some(Value::Text(text)) if text == NO => Ok(Outcome::Yes(false)),
        Some(_) => Err(ProgramError::Undefined(program.to_string())),
        None => Err(ProgramError::NotAStep(program.to_string())),
    }
}

/// What a step gives in the original, which is written in Python: programs that make no sense are computed on with, and
/// what they give is compared all the same.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Number(f64),
    /// A root of a negative number: it fails at a comparison, or at the end.
    Complex,
    /// What `greater` says: texts are compared and joined as texts are.
    Text(String),
}

const YES: &str = "yes";
const NO: &str = "no";

/// Five places, half to even of the exact value, as Python's `round` does.
pub fn rounded(number: f64) -> f64 {
    // Every finite number that is printed can be read again.
    format!("{number:.5}").parse().unwrap_or(number)
}

/// A number as the programs write it: `1,234`, `5%`, `const_100`, `const_m1`.
pub fn number_of(text: &str) -> Option<f64> {
    let text = text.trim().replace(',', "");
    let finite = |number: f64| number.is_finite().then_some(number);
    if let Ok(number) = text.parse::<f64>() {
        return finite(number);
    }
    if text.contains('%') {
        return text
            .replace('%', "")
            .trim()
            .parse::<f64>()
            .ok()
            .and_then(finite)
            .map(|number| number / 100.0);
    }
    match text.strip_prefix("const_")? {
        "m1" => Some(-1.0),
        digits => digits.parse().ok().and_then(finite),
    }
}

#[derive(Debug)]
struct Step<'a> {
    operation: &'a str,
    first: &'a str,
    second: &'a str,
}

/// Cuts a program into steps. A row's name may hold commas, but no bracket that closes.
fn steps(program: &str) -> Result<Vec<Step<'_>>, ProgramError> {
    let mut steps = Vec::new();
    let mut rest = program;
    while !rest.is_empty() {
        let wrong = || ProgramError::NotAStep(rest.to_string());
        let (operation, behind) = rest.split_once('(').ok_or_else(wrong)?;
        let operation = operation.trim();
        let (arguments, after) = behind.split_once(')').ok_or_else(wrong)?;
        if !OPERATIONS.contains(&operation) || arguments.contains('(') {
            return Err(wrong());
        }
        let pair = if operation.starts_with("table") {
            arguments.rsplit_once(',')
        } else {
            // A comma between thousands has no space behind it.
            arguments.split_once(", ").or_else(|| arguments.split_once(','))
        };
        let (first, second) = pair.ok_or_else(wrong)?;
        steps.push(Step { operation, first: first.trim(), second: second.trim() });
        rest = after.trim_start().trim_start_matches(',').trim_start();
    }
    Ok(steps)
}

impl Step<'_> {
    fn run(&self, results: &[Value], table: &[Vec<String>]) -> Result<Value, ProgramError> {
        if self.operation.starts_with("table") {
            return self.over_row(table).map(Value::Number);
        }
        let operands = (argument(self.first, results)?, argument(self.second, results)?);
        let undefined =
            || ProgramError::Undefined(format!("{}({}, {})", self.operation, self.first, self.second));
        let said = |yes: bool| Value::Text(if yes { YES } else { NO }.to_string());
        match (self.operation, operands) {
            ("greater", (Value::Number(a), Value::Number(b))) => Ok(said(a > b)),
            ("greater", (Value::Text(a), Value::Text(b))) => Ok(said(a > b)),
            ("add", (Value::Text(a), Value::Text(b))) => Ok(Value::Text(a + &b)),
            ("greater", _) | (_, (Value::Text(_), _) | (_, Value::Text(_))) => Err(undefined()),
            (_, (Value::Complex, _) | (_, Value::Complex)) => Ok(Value::Complex),
            ("exp", (Value::Number(a), Value::Number(b))) if a < 0.0 && b.fract() != 0.0 => {
                Ok(Value::Complex)
            }
            (operation, (Value::Number(a), Value::Number(b))) => {
                let number = match operation {
                    "add" => a + b,
                    "subtract" => a - b,
                    "multiply" => a * b,
                    "divide" => a / b,
                    _ => a.powf(b),
                };
                if number.is_finite() { Ok(Value::Number(number)) } else { Err(undefined()) }
            }
        }
    }

    fn over_row(&self, table: &[Vec<String>]) -> Result<f64, ProgramError> {
        // The last of several rows of one name counts, as in the dictionary of the original.
        let rows = table.iter().rev().filter_map(|row| row.split_first());
        let cells = rows
            .filter(|(name, _)| name.as_str() == self.first)
            .map(|(_, cells)| cells)
            .next()
            .ok_or_else(|| ProgramError::NoSuchRow(self.first.to_string()))?;
        let numbers =
            cells.iter().map(|cell| cell_number(cell).ok_or_else(|| ProgramError::NotANumber(cell.clone())));
        let numbers = numbers.collect::<Result<Vec<f64>, _>>()?;
        if numbers.is_empty() {
            return Err(ProgramError::NoSuchRow(self.first.to_string()));
        }
        let sum: f64 = numbers.iter().sum();
        Ok(match self.operation {
            "table_max" => numbers.into_iter().fold(f64::NEG_INFINITY, f64::max),
            "table_min" => numbers.into_iter().fold(f64::INFINITY, f64::min),
            "table_sum" => sum,
            _ => sum / numbers.len() as f64,
        })
    }
}

fn argument(text: &str, results: &[Value]) -> Result<Value, ProgramError> {
    if !text.contains('#') {
        return number_of(text).map(Value::Number).ok_or_else(|| ProgramError::NotANumber(text.to_string()));
    }
    let step: Option<usize> = text.replace('#', "").trim().parse().ok();
    let result = step.and_then(|step| results.get(step)).cloned();
    result.ok_or_else(|| ProgramError::NoSuchStep(text.to_string()))
}

/// A cell such as `$ 78.25` or `-4.1 ( 4.1 )`: what stands before the bracket.
fn cell_number(cell: &str) -> Option<f64> {
    number_of(cell.replace('$', "").split('(').next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<Vec<String>> {
        [
            ["", "2014", "2013"],
            ["sales, net", "$ 1,200", "-4.1 ( 4.1 )"],
            ["share", "5%", "7%"],
            ["odd", "n/a", "1"],
        ]
        .map(|row| row.map(str::to_string).to_vec())
        .to_vec()
    }

    fn number(program: &str) -> f64 {
        match execute(program, &table()) {
            Ok(Outcome::Number(number)) => number,
            other => panic!("{program}: {other:?}"),
        }
    }

    #[test]
    fn programs_give_numbers_rounded_to_five_places() {
        assert_eq!(number("subtract(164, 189), divide(#0, 189)"), -0.13228);
        assert_eq!(number("206588"), 206_588.0);
        assert_eq!(number("25%"), 0.25);
        assert_eq!(number("add(1,234, const_100)"), 1334.0);
        assert_eq!(number("multiply(const_m1, 2.5)"), -2.5);
        assert_eq!(number("exp(2, 10)"), 1024.0);
        assert_eq!(number("divide(1, 3)"), 0.33333);
        // The double nearest to 2.000005 lies below it: the exact value decides.
        assert_eq!(number("divide(2.000005, 1)"), 2.0);
        assert_eq!(number("divide(0.5, 100000)"), 1e-5);
        assert_eq!(number("table_max(sales, net, none)"), 1200.0);
        assert_eq!(number("table_min(sales, net, none)"), -4.1);
        assert_eq!(number("table_sum(share, none), multiply(#0, 100)"), 12.0);
        assert_eq!(number("table_average(share, none)"), 0.06);
        assert_eq!(execute("greater(2, 1)", &[]), Ok(Outcome::Yes(true)));
        assert_eq!(execute("subtract(1, 2), greater(#0, 0)", &[]), Ok(Outcome::Yes(false)));
    }

    #[test]
    fn what_is_no_program_is_an_error() {
        use ProgramError::{NoSuchRow, NoSuchStep, NotANumber, NotAStep, Undefined};
        let error = |program: &str| execute(program, &table()).expect_err(program);
        assert!(matches!(error(""), NotANumber(_)));
        assert!(matches!(error("I do not know"), NotANumber(_)));
        assert!(matches!(error("nan"), NotANumber(_)));
        assert!(matches!(error("power(2, 3)"), NotAStep(_)));
        assert!(matches!(error("add(1, 2"), NotAStep(_)));
        assert!(matches!(error("add(1)"), NotAStep(_)));
        assert!(matches!(error("add(1, multiply(2, 3))"), NotAStep(_)));
        assert!(matches!(error("add(1, 2) and so on"), NotAStep(_)));
        assert!(matches!(error("add(1, x)"), NotANumber(_)));
        assert!(matches!(error("add(1, #0)"), NoSuchStep(_)));
        assert!(matches!(error("greater(1, 2), add(#0, 1)"), Undefined(_)));
        assert!(matches!(error("add(1, 2), add(#99999999999999999999, 1)"), NoSuchStep(_)));
        assert!(matches!(error("divide(1, 0)"), Undefined(_)));
        assert!(matches!(error("exp(-1, 0.5)"), Undefined(_)));
        assert!(matches!(error("exp(10, 999)"), Undefined(_)));
        assert!(matches!(error("table_sum(costs, none)"), NoSuchRow(_)));
        assert!(matches!(error("table_sum(odd, none)"), NotANumber(_)));
    }

    #[test]
    fn rounding_is_that_of_python() {
        for (number, expected) in [
            (0.000_005, 0.00001),
            (0.000_015, 0.00002),
            (0.000_025, 0.00003),
            (2.5, 2.5),
            (1e300, 1e300),
            (-0.000_001, -0.0),
        ] {
            assert_eq!(rounded(number), expected, "{number}");
        }
    }

    #[test]
    fn a_program_is_known_by_its_first_word() {
        assert!(begins(" add(1, 2)") && begins("table_max (x, none)"));
        assert!(!begins("added(1, 2)") && !begins("5") && !begins("the sum add(1, 2)"));
    }
}
