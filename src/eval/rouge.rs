//! ROUGE-L (Lin 2004) between an answer and its reference, with the words of the `rouge-score` package:
//! lower case, everything but `a`–`z` and `0`–`9` is a space, no stemming.

/// Longest answers are compared by their first so many words: the time is the product of both lengths.
const WORDS: usize = 4096;

/// The harmonic mean of precision and recall of the longest common subsequence of words, in `[0, 1]`.
pub fn rouge_l(reference: &str, answer: &str) -> f64 {
    let (reference, answer) = (words(reference), words(answer));
    if reference.is_empty() || answer.is_empty() {
        return 0.0;
    }
    let common = longest_common(&reference, &answer) as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / answer.len() as f64, common / reference.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

fn words(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let words = text.split(|letter: char| !letter.is_ascii_lowercase() && !letter.is_ascii_digit());
    words.filter(|word| !word.is_empty()).take(WORDS).map(str::to_string).collect()
}

/// Length of the longest common subsequence, one row of the table at a time.
fn longest_common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for left in a {
        let mut diagonal = 0;
        for (at, right) in b.iter().enumerate() {
            let above = row[at + 1];
            row[at + 1] = if left == right { diagonal + 1 } else { above.max(row[at]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

/// Whether two texts are the same but for letter case, white space and a full stop at the end.
pub fn same_text(reference: &str, answer: &str) -> bool {
    let plain = |text: &str| {
        let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
        words.join(" ").trim_end_matches('.').to_string()
    };
    plain(reference) == plain(answer)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_the_package() {
        // Written by scripts/oracle/rouge.py.
        let cases: Vec<(String, String, f64)> =
            serde_json::from_str(include_str!("../../tests/fixtures/rouge.json")).unwrap();
        assert!(cases.len() >= 20);
        for (reference, answer, expected) in cases {
            let found = rouge_l(&reference, &answer);
            assert!(
                (found - expected).abs() < 1e-12,
                "{reference:?} and {answer:?}: {found}, not {expected}"
            );
        }
    }

    #[test]
    fn texts_are_the_same_but_for_case_and_white_space() {
        assert!(same_text("Paris.", " paris\n") && same_text("a  b", "A b"));
        assert!(!same_text("a b", "ab") && !same_text("", "x") && same_text("", " "));
    }
}
