//! Numbers in what a model says.

use std::ops::Range;

/// The places of all numbers: digits with commas between thousands and a decimal point, a sign where nothing
/// but a bracket, a mark or white space stands before it.
pub fn places(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match end_of_number(bytes, at) {
            Some(end) => {
                let start = if is_signed(bytes, at) { at - 1 } else { at };
                found.push(start..end);
                at = end;
            }
            None => at += 1,
        }
    }
    found
}

/// The last number.
pub fn last(text: &str) -> Option<f64> {
    value(&text[places(text).pop()?])
}

/// A number as written, commas and a sign for money left out.
pub fn value(text: &str) -> Option<f64> {
    let digits: String =
        text.chars().filter(|letter| !letter.is_whitespace() && !",$".contains(*letter)).collect();
    digits.parse().ok().filter(|number: &f64| number.is_finite())
}

fn is_signed(bytes: &[u8], at: usize) -> bool {
    let before = |back: usize| at.checked_sub(back).and_then(|place| bytes.get(place)).copied();
    before(1) == Some(b'-')
        && before(2).is_none_or(|byte| !byte.is_ascii_alphanumeric() && !b")]%".contains(&byte))
}

/// Where the number ends that begins here; a comma or a point counts with digits behind it only.
fn end_of_number(bytes: &[u8], start: usize) -> Option<usize> {
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let point = bytes.get(start) == Some(&b'.') && digit(start + 1);
    if !digit(start) && !point {
        return None;
    }
    let (mut at, mut fraction) = (start, false);
    loop {
        match bytes.get(at) {
            Some(byte) if byte.is_ascii_digit() => at += 1,
            Some(b',') if !fraction && digit(at + 1) => at += 1,
            Some(b'.') if !fraction && digit(at + 1) => {
                fraction = true;
                at += 1;
            }
            _ => return Some(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_as_people_write_them() {
        for (text, expected) in [
            ("She has 18.", Some(18.0)),
            ("$1,234.50 in all", Some(1234.5)),
            ("between 3 and -4", Some(-4.0)),
            ("16-3", Some(3.0)),
            ("x = -.5", Some(-0.5)),
            ("1.2.3", Some(0.3)),
            ("(-7)", Some(-7.0)),
            ("$-7", Some(-7.0)),
            ("5%-7%", Some(7.0)),
            ("none", None),
            ("", None),
            ("größer als 5,", Some(5.0)),
        ] {
            assert_eq!(last(text), expected, "{text:?}");
        }
        assert_eq!(value("1,000"), Some(1000.0));
        assert_eq!(value(" $ 5"), Some(5.0));
        assert_eq!(value("1e999"), None);
        assert_eq!(value("nan"), None);
    }
}
