//! Documents to passages: stretches of text that the encoder reads whole.
//!
//! A passage ends at a paragraph where that wastes less than half of it, else at a sentence or line, and only inside
//! a sentence that is itself too long. After a cut inside a paragraph the next passage repeats the last sentences, so
//! that what refers back keeps its antecedent.

use std::ops::Range;

/// How long passages are, in tokens of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest passage; at least 1.
    pub tokens: usize,
    /// Most tokens of the previous passage that one repeats; less than `tokens`.
    pub overlap: usize,
}

/// A sentence, a line, or a piece of one that is too long: what is never cut again.
#[derive(Debug, Clone)]
struct Unit {
    /// Bytes of the text.
    range: Range<usize>,
    tokens: usize,
    /// Tokens of the whole paragraph, when the unit begins one.
    paragraph: Option<usize>,
}

/// Byte ranges of the passages of `text`, in order.
///
/// `tokens` are the byte ranges of the encoder's tokens in `text`, in order, without special tokens. Each token that
/// is not white space lies in a passage, every range is on character boundaries and none is blank.
pub fn passages(text: &str, tokens: &[Range<usize>], limits: Limits) -> Vec<Range<usize>> {
    let units = units(text, tokens, limits.tokens.max(1));
    let mut passages = Vec::new();
    let mut first = 0; // of the passage that grows
    let mut length = 0; // its tokens
    for (at, unit) in units.iter().enumerate() {
        if at > first && !fits(unit, length, limits.tokens) {
            passages.push(units[first].range.start..units[at - 1].range.end);
            first = if unit.paragraph.is_some() { at } else { overlap_start(&units, first, at, limits) };
            length = units[first..at].iter().map(|unit| unit.tokens).sum();
        }
        length += unit.tokens;
    }
    if let (Some(begin), Some(end)) = (units.get(first), units.last()) {
        passages.push(begin.range.start..end.range.end);
    }
    passages
}

/// Whether `unit` joins a passage of `length` tokens: a paragraph that would be torn waits for the next passage,
/// unless this one would stay half empty.
fn fits(unit: &Unit, length: usize, limit: usize) -> bool {
    let torn = unit.paragraph.is_some_and(|paragraph| length + paragraph > limit);
    length + unit.tokens <= limit && !(torn && length * 2 >= limit)
}

/// The first unit of a passage that continues before unit `at`: as many as the overlap and the limit allow.
fn overlap_start(units: &[Unit], first: usize, at: usize, limits: Limits) -> usize {
    let room = limits.overlap.min(limits.tokens.saturating_sub(units[at].tokens));
    let mut start = at;
    let mut repeated = 0;
    // Not the whole of the last passage: each must bring something new.
    while start > first + 1 && repeated + units[start - 1].tokens <= room {
        start -= 1;
        repeated += units[start].tokens;
    }
    start
}

fn units(text: &str, tokens: &[Range<usize>], limit: usize) -> Vec<Unit> {
    let mut units = Vec::new();
    for paragraph in paragraphs(text) {
        let total = count(tokens, &paragraph);
        let mut begins = Some(total);
        for sentence in sentences(text, paragraph) {
            for range in cut(text, tokens, sentence, limit) {
                units.push(Unit { tokens: count(tokens, &range), range, paragraph: begins.take() });
            }
        }
    }
    units
}

/// Stretches between blank lines, trimmed.
fn paragraphs(text: &str) -> Vec<Range<usize>> {
    let mut paragraphs = Vec::new();
    let mut start = 0;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if line.trim().is_empty() {
            push_trimmed(text, start..at, &mut paragraphs);
            start = at + line.len();
        }
        at += line.len();
    }
    push_trimmed(text, start..text.len(), &mut paragraphs);
    paragraphs
}

/// Sentences and lines of a paragraph, trimmed.
fn sentences(text: &str, paragraph: Range<usize>) -> Vec<Range<usize>> {
    let mut sentences = Vec::new();
    let mut start = paragraph.start;
    let mut characters = text[paragraph.clone()].char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        let next = characters.peek().map(|&(_, next)| next);
        if ends_sentence(character, next) {
            let end = paragraph.start + at + character.len_utf8();
            push_trimmed(text, start..end, &mut sentences);
            start = end;
        }
    }
    push_trimmed(text, start..paragraph.end, &mut sentences);
    sentences
}

/// `3.5` and `e.g.,` go on; ideographic stops need no space behind them.
fn ends_sentence(character: char, next: Option<char>) -> bool {
    match character {
        '\n' | '。' | '！' | '？' => true,
        '.' | '!' | '?' | ';' => next.is_some_and(char::is_whitespace),
        _ => false,
    }
}

fn push_trimmed(text: &str, range: Range<usize>, into: &mut Vec<Range<usize>>) {
    let slice = &text[range.clone()];
    let trimmed = slice.trim();
    if !trimmed.is_empty() {
        let start = range.start + (slice.len() - slice.trim_start().len());
        into.push(start..start + trimmed.len());
    }
}

/// `range` in pieces of at most `limit` tokens, cut before a word where there is one, else before a token.
fn cut(text: &str, tokens: &[Range<usize>], range: Range<usize>, limit: usize) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut rest = range;
    while count(tokens, &rest) > limit {
        let first = tokens.partition_point(|token| token.start < rest.start);
        let is_cut = |&at: &usize| {
            let start = tokens[at].start;
            start > rest.start && text.is_char_boundary(start)
        };
        let begins_word = |&at: &usize| tokens[at - 1].end < tokens[at].start;
        let mut candidates = (first + 1..=first + limit).rev().filter(is_cut);
        let found = candidates.clone().find(begins_word).or_else(|| candidates.next());
        // Several tokens may lie on one character: then it stays whole.
        let Some(at) = found else { break };
        push_trimmed(text, rest.start..tokens[at].start, &mut pieces);
        rest = tokens[at].start..rest.end;
    }
    push_trimmed(text, rest, &mut pieces);
    pieces
}

/// Tokens that begin in `range`.
fn count(tokens: &[Range<usize>], range: &Range<usize>) -> usize {
    let begin = tokens.partition_point(|token| token.start < range.start);
    let end = tokens.partition_point(|token| token.start < range.end);
    end.saturating_sub(begin)
}
