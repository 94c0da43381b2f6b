//! Passages: whole, ordered, within the limit.

use std::ops::Range;

use granite::retrieval::chunk::{Limits, passages};

/// A token per word, as a word tokenizer would give.
fn words(text: &str) -> Vec<Range<usize>> {
    let mut spans = Vec::new();
    let mut start = None;
    for (at, character) in text.char_indices().chain([(text.len(), ' ')]) {
        match (start, character.is_whitespace()) {
            (None, false) => start = Some(at),
            (Some(begin), true) => {
                spans.push(begin..at);
                start = None;
            }
            _ => {}
        }
    }
    spans
}

/// A token per character that is no space: words have no boundary of their own.
fn letters(text: &str) -> Vec<Range<usize>> {
    text.char_indices().filter(|(_, c)| !c.is_whitespace()).map(|(at, c)| at..at + c.len_utf8()).collect()
}

fn split(text: &str, tokens: usize, overlap: usize) -> Vec<&str> {
    passages(text, &words(text), Limits { tokens, overlap }).into_iter().map(|range| &text[range]).collect()
}

#[test]
fn a_short_text_is_one_passage() {
    assert_eq!(split("  One line. Another.\n\nA third.  ", 10, 2), ["One line. Another.\n\nA third."]);
}

#[test]
fn nothing_gives_nothing() {
    assert!(split("", 10, 2).is_empty());
    assert!(split(" \n\t\n ", 10, 2).is_empty());
}

#[test]
fn paragraphs_stay_whole_where_that_wastes_little() {
    let text = "a b c d e f.\n\ng h i. j k l.";
    assert_eq!(split(text, 9, 3), ["a b c d e f.", "g h i. j k l."]);
    // Half empty is too much waste: then the paragraph is torn at a sentence.
    assert_eq!(split("a b c.\n\ng h i. j k l. m n o.", 9, 0), ["a b c.\n\ng h i. j k l.", "m n o."]);
}

#[test]
fn a_torn_paragraph_repeats_its_last_sentences() {
    let text = "One two three. Four five. Six seven. Eight nine ten.";
    assert_eq!(split(text, 7, 2), ["One two three. Four five. Six seven.", "Six seven. Eight nine ten."]);
    assert_eq!(split(text, 7, 0), ["One two three. Four five. Six seven.", "Eight nine ten."]);
}

#[test]
fn numbers_do_not_end_sentences() {
    assert_eq!(split("Up 3.5 to 7.2 points. Then down.", 5, 0), ["Up 3.5 to 7.2 points.", "Then down."]);
}

#[test]
fn a_sentence_that_is_too_long_is_cut_between_words() {
    assert_eq!(split("a b c d e f g", 3, 1), ["a b c", "d e f", "g"]);
    assert_eq!(split("a b c d e f g", 3, 0), ["a b c", "d e f", "g"]);
}

#[test]
fn a_word_without_end_is_cut_between_tokens() {
    let text = "純利益は前年比で増加した";
    let ranges = passages(text, &letters(text), Limits { tokens: 5, overlap: 2 });
    let pieces: Vec<&str> = ranges.into_iter().map(|range| &text[range]).collect();
    assert_eq!(pieces, ["純利益は前", "年比で増加", "した"]);
}

#[test]
fn tokens_on_one_character_do_not_split_it() {
    // A byte-level tokenizer gives an emoji several tokens with the same or inner offsets.
    let text = "📈";
    assert_eq!(passages(text, &[0..4, 0..4, 0..4], Limits { tokens: 1, overlap: 0 }), vec![0..4; 1]);
    assert_eq!(passages(text, &[0..1, 1..2, 2..3, 3..4], Limits { tokens: 2, overlap: 0 }), vec![0..4; 1]);
}

#[test]
fn whatever_the_text_nothing_is_lost_and_nothing_is_too_long() {
    let pieces = [
        "alpha",
        " ",
        "beta.",
        "\n",
        "\n\n",
        "gamma! ",
        "日本語。",
        "x",
        ". ",
        "\r",
        "\u{a0}",
        "é",
        "1.5",
        "?",
    ];
    let mut state = 17u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as usize) % below
    };
    for _ in 0..2000 {
        let text: String = (0..random(60)).map(|_| pieces[random(pieces.len())]).collect();
        let limits = Limits { tokens: 1 + random(9), overlap: random(4) };
        for tokens in [words(&text), letters(&text)] {
            let found = passages(&text, &tokens, limits);
            for range in &found {
                let passage = &text[range.clone()];
                assert!(!passage.trim().is_empty() && passage.trim() == passage, "{text:?} {range:?}");
                let inside = tokens.iter().filter(|token| range.contains(&token.start)).count();
                assert!(inside <= limits.tokens, "{text:?}: {passage:?} has {inside} tokens, {limits:?}");
            }
            for token in &tokens {
                assert!(
                    found.iter().any(|range| range.contains(&token.start)),
                    "{text:?}: {token:?} is lost"
                );
            }
            for pair in found.windows(2) {
                assert!(pair[0].start < pair[1].start && pair[0].end < pair[1].end, "{text:?}: {found:?}");
            }
        }
    }
}
