//! What of a text says something: its words, folded and hashed, and how much two texts share.
//!
//! Case, white space and punctuation of prose are passed over. Signs that carry meaning in code and arithmetic are words
//! of their own, and a number is one word with its decimal point: `3.5` is not `35`.

use std::collections::HashSet;

/// Words of a shingle.
const SHINGLE: usize = 3;

/// A text as hashes of its words.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Words {
    /// Every word, in order.
    pub hashes: Vec<u64>,
    /// Words with a digit, sorted.
    numbers: Vec<u64>,
    /// Words that are capitalised where no sentence begins.
    names: Vec<u64>,
}

impl Words {
    /// The words of a text; of one that has none, such as a lone smiley, the whole text is the one word.
    pub fn of(text: &str) -> Self {
        let mut words = Self::default();
        let mut chars = text.char_indices().peekable();
        let mut begins = true;
        while let Some((at, c)) = chars.next() {
            if c.is_alphanumeric() {
                let mut end = at + c.len_utf8();
                while let Some((next, c)) = chars.peek().copied() {
                    if !continues(text.get(at..).unwrap_or_default(), next - at, c) {
                        break;
                    }
                    end = next + c.len_utf8();
                    chars.next();
                }
                words.push(text.get(at..end).unwrap_or_default(), begins);
                begins = false;
            } else if is_sign(c, chars.peek().map(|(_, next)| *next)) {
                words.hashes.push(hash_of(&[c]));
            }
            begins |= matches!(c, '.' | '!' | '?' | ':' | '\n' | '"' | '“');
        }
        if words.hashes.is_empty() && !text.trim().is_empty() {
            words.hashes.push(hash_of(&text.trim().chars().collect::<Vec<_>>()));
        }
        words.numbers.sort_unstable();
        words
    }

    fn push(&mut self, word: &str, begins: bool) {
        let hash = hash_of(&word.chars().flat_map(char::to_lowercase).collect::<Vec<_>>());
        self.hashes.push(hash);
        if word.contains(|c: char| c.is_numeric()) {
            self.numbers.push(hash);
        } else if !begins && word.starts_with(char::is_uppercase) {
            self.names.push(hash);
        }
    }

    /// Hashes of the shingles: three words in a row, or all of a text that has fewer. Sorted, each once.
    pub fn shingles(&self) -> Vec<u64> {
        let mut shingles: Vec<u64> = if self.hashes.len() < SHINGLE {
            vec![joined(&self.hashes)]
        } else {
            self.hashes.windows(SHINGLE).map(joined).collect()
        };
        shingles.sort_unstable();
        shingles.dedup();
        shingles
    }

    /// Hashes of every run of `length` words.
    pub fn runs(&self, length: usize) -> impl Iterator<Item = u64> + '_ {
        self.hashes.windows(length.max(1)).map(joined)
    }

    /// One hash of all words in order.
    pub fn whole(&self) -> u64 {
        joined(&self.hashes)
    }

    /// Whether both hold the same numbers, and every name of one is a word of the other.
    ///
    /// Texts that differ in one number or one name alone say something else, however long they are.
    pub fn tell_of_the_same(&self, other: &Self) -> bool {
        self.numbers == other.numbers && self.has_names_of(other) && other.has_names_of(self)
    }

    fn has_names_of(&self, other: &Self) -> bool {
        if other.names.is_empty() {
            return true;
        }
        let words: HashSet<u64> = self.hashes.iter().copied().collect();
        other.names.iter().all(|name| words.contains(name))
    }
}

/// The share of the shingles of both that both have: Jaccard's index of two sorted sets, in `[0, 1]`.
pub fn similarity(one: &[u64], other: &[u64]) -> f64 {
    let (mut a, mut b, mut shared) = (one.iter().peekable(), other.iter().peekable(), 0_usize);
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        match x.cmp(y) {
            std::cmp::Ordering::Less => _ = a.next(),
            std::cmp::Ordering::Greater => _ = b.next(),
            std::cmp::Ordering::Equal => {
                shared += 1;
                a.next();
                b.next();
            }
        }
    }
    let union = one.len() + other.len() - shared;
    if union == 0 { 1.0 } else { shared as f64 / union as f64 }
}

/// Whether the word that starts `text` goes on with `c` at byte `at`.
fn continues(text: &str, at: usize, c: char) -> bool {
    if c.is_alphanumeric() {
        return true;
    }
    // A decimal point or a comma between digits.
    let before = text.get(..at).and_then(|text| text.chars().next_back());
    let after = text.get(at + c.len_utf8()..).and_then(|text| text.chars().next());
    matches!(c, '.' | ',')
        && before.is_some_and(|c| c.is_ascii_digit())
        && after.is_some_and(|c| c.is_ascii_digit())
}

/// Signs that change what code or arithmetic means; an exclamation mark does only before something.
fn is_sign(c: char, next: Option<char>) -> bool {
    match c {
        '+' | '-' | '*' | '/' | '<' | '>' | '=' | '%' | '&' | '|' | '^' | '~' | '$' | '#' | '@' | '\\' => {
            true
        }
        '!' => next.is_some_and(|next| !next.is_whitespace()),
        _ => false,
    }
}

fn hash_of(chars: &[char]) -> u64 {
    mix(chars.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, c| {
        (hash ^ u64::from(*c)).wrapping_mul(0x0000_0100_0000_01b3)
    }))
}

/// A hash of hashes in order.
fn joined(hashes: &[u64]) -> u64 {
    hashes.iter().fold(hashes.len() as u64, |joined, hash| mix(joined.rotate_left(5) ^ hash))
}

/// The finaliser of SplitMix64: every bit of the input moves every bit of the output.
pub fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(one: &str, other: &str) -> bool {
        Words::of(one).hashes == Words::of(other).hashes
    }

    #[test]
    fn layout_case_and_punctuation_say_nothing() {
        assert!(same("How many States, are there?", "how  many\nstates are there"));
        assert!(same("(a, b)", "a b."));
        assert!(same("", " \n"));
        assert!(!same("🙂", "🙁"), "a text without words is told by itself");
    }

    #[test]
    fn numbers_and_signs_do() {
        assert!(!same("3.5", "35") && !same("3.5", "3 5") && same("1,000 of them.", "1,000 of them"));
        assert!(!same("a < b", "a > b") && !same("x + 1", "x - 1") && !same("a != b", "a = b"));
        assert!(same("Stop!", "stop"));
    }

    #[test]
    fn one_other_number_or_name_is_another_text() {
        let same = |one: &str, other: &str| Words::of(one).tell_of_the_same(&Words::of(other));
        assert!(!same("What is 3+4", "What is 3+5"));
        assert!(!same("Write to Anna now", "Write to Berta now"));
        assert!(same("Write to anna now", "Write to Anna now"));
        assert!(same("Show the names", "List the names"), "a sentence's first word is no name");
    }

    #[test]
    fn similarity_is_the_share_of_what_both_have() {
        let shingles = |text: &str| Words::of(text).shingles();
        // abc bcd cde against abc bcd cdf: two of four.
        assert_eq!(similarity(&shingles("a b c d e"), &shingles("a b c d f")), 0.5);
        assert_eq!(similarity(&shingles("a b"), &shingles("A b!")), 1.0);
        assert_eq!(similarity(&shingles("a b"), &shingles("b a")), 0.0);
        assert_eq!(similarity(&[], &[]), 1.0);
    }
}
