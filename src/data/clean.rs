//! Characters that nobody sees and no model should learn: byte order marks, zero-width characters, control characters.
//!
//! Line breaks, tabs and every other space stay as they are: code needs them. Text is not normalised (NFC) either: what
//! a response spells, the model is to spell. A joiner between two letters of a script that needs it, or inside of an
//! emoji, stays too.

use serde::{Deserialize, Serialize};

use super::example::{Example, Message};

/// Examples of a source that its report shows.
const SHOWN: usize = 5;
/// Characters around the first one removed that the report shows.
const AROUND: usize = 24;
/// Bytes that are looked at together.
const BLOCK: usize = 64;

/// What was removed from a source's texts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Cleaned {
    /// Examples that lost a character.
    pub examples: usize,
    /// Byte order marks (U+FEFF).
    pub byte_order_marks: usize,
    /// Characters without width: U+200B to U+200F, U+202A to U+202E, U+2060 to U+2064, U+2066 to U+2069.
    pub zero_width: usize,
    /// Control characters (C0 but line break and tab, DEL, C1).
    pub control: usize,
    /// The first few.
    pub shown: Vec<CleanedText>,
}

/// One text that lost a character.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanedText {
    /// Record of the source's file.
    pub record: u32,
    /// The surroundings of the first character removed, which is written as `<U+200B>`.
    pub text: String,
}

/// What kind of character is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ByteOrderMark,
    ZeroWidth,
    Control,
}

impl Cleaned {
    /// Cleans an example and counts what it lost; its cuts and its question move with the text.
    pub fn clean(&mut self, example: &mut Example) {
        let Some(first) = example.messages.iter().find_map(|message| first_removed(&message.content)) else {
            return;
        };
        self.examples += 1;
        if self.shown.len() < SHOWN {
            self.shown.push(CleanedText { record: example.record, text: first });
        }
        example.document = without(&example.document).unwrap_or_else(|| example.document.clone());
        for at in 0..example.messages.len() {
            self.clean_message(example, at);
        }
    }

    /// Counts what was removed from texts behind these.
    pub fn add(&mut self, later: Self) {
        self.examples += later.examples;
        self.byte_order_marks += later.byte_order_marks;
        self.zero_width += later.zero_width;
        self.control += later.control;
        let room = SHOWN.saturating_sub(self.shown.len());
        self.shown.extend(later.shown.into_iter().take(room));
    }

    fn clean_message(&mut self, example: &mut Example, at: usize) {
        let Some(Message { content, .. }) = example.messages.get(at) else { return };
        let Some(cleaned) = without(content) else { return };
        let content = content.clone();
        for kind in removed(&content).map(|(_, kind)| kind) {
            match kind {
                Kind::ByteOrderMark => self.byte_order_marks += 1,
                Kind::ZeroWidth => self.zero_width += 1,
                Kind::Control => self.control += 1,
            }
        }
        let (trimmed_start, trimmed) = trimmed(&cleaned);
        let moved = Moved { before: &content, trimmed_start, length: trimmed.len() };
        for cut in example.cuts.iter_mut().filter(|cut| cut.message == at) {
            cut.bytes = moved.place(cut.bytes.start)..moved.place(cut.bytes.end);
        }
        if example.question_message() == Some(at) {
            let question = example.question.clone();
            example.question = moved.place(question.start)..moved.place(question.end);
        }
        let cleaned = trimmed.to_string();
        if let Some(message) = example.messages.get_mut(at) {
            message.content = cleaned;
        }
    }
}

/// Where the bytes of a text lie after cleaning.
struct Moved<'a> {
    before: &'a str,
    /// Bytes of white space that a removed character had kept from being trimmed.
    trimmed_start: usize,
    length: usize,
}

impl Moved<'_> {
    fn place(&self, byte: usize) -> usize {
        let lost: usize = removed(self.before)
            .take_while(|(at, _)| *at < byte)
            .map(|(at, _)| lost_bytes(self.before, at))
            .sum();
        (byte - lost.min(byte)).saturating_sub(self.trimmed_start).min(self.length)
    }
}

fn trimmed(text: &str) -> (usize, &str) {
    let inside = text.trim_start();
    (text.len() - inside.len(), inside.trim_end())
}

/// The text without what is removed; `None` where nothing is.
pub fn without(text: &str) -> Option<String> {
    let mut cleaned = String::new();
    let mut from = 0;
    for (at, _) in removed(text) {
        cleaned.push_str(text.get(from..at).unwrap_or_default());
        let character = text.get(at..).and_then(|rest| rest.chars().next());
        from = at + character.map_or(1, char::len_utf8);
        if becomes_line_break(text, at) {
            cleaned.push('\n');
        }
    }
    if from == 0 {
        return None;
    }
    cleaned.push_str(text.get(from..).unwrap_or_default());
    Some(cleaned)
}

/// A lone carriage return, a vertical tab or a form feed parts lines: removed, it would join two words.
fn becomes_line_break(text: &str, at: usize) -> bool {
    match text.as_bytes().get(at) {
        Some(b'\r') => text.as_bytes().get(at + 1) != Some(&b'\n'),
        Some(0x0b | 0x0c) => true,
        _ => false,
    }
}

fn lost_bytes(text: &str, at: usize) -> usize {
    let width = text.get(at..).and_then(|rest| rest.chars().next()).map_or(0, char::len_utf8);
    width - usize::from(becomes_line_break(text, at))
}

/// Places and kinds of what is removed from a text.
fn removed(text: &str) -> impl Iterator<Item = (usize, Kind)> + '_ {
    let (start, rest) = text.split_at(plain(text));
    let places = rest.char_indices().map(move |(at, c)| (start.len() + at, c));
    places.filter_map(|(at, c)| Some((at, kind_of(text, at, c)?)))
}

/// Bytes at the beginning in which nothing is removed. Block by block, which takes vector instructions: texts are
/// long, and hardly any loses a character.
fn plain(text: &str) -> usize {
    let is_plain = |byte: &u8| matches!(byte, b' '..=b'~' | b'\n' | b'\t');
    let blocks = text.as_bytes().chunks(BLOCK);
    blocks
        .take_while(|block| block.iter().fold(true, |plain, byte| plain & is_plain(byte)))
        .map(<[u8]>::len)
        .sum()
}

fn kind_of(text: &str, at: usize, c: char) -> Option<Kind> {
    match c {
        '\n' | '\t' => None,
        ' '..='~' => None,
        '\u{feff}' => Some(Kind::ByteOrderMark),
        '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{2064}'
        | '\u{2066}'..='\u{2069}' => (!is_needed(text, at, c)).then_some(Kind::ZeroWidth),
        c if c.is_control() => Some(Kind::Control),
        _ => None,
    }
}

/// Whether both neighbours are of scripts that join or turn their letters, or emoji: there these characters have a use.
fn is_needed(text: &str, at: usize, c: char) -> bool {
    let joins = |c: Option<char>| {
        c.is_some_and(|c| c >= '\u{0590}' && !('\u{1e00}'..='\u{206f}').contains(&c) && c != '\u{feff}')
    };
    let before = text.get(..at).and_then(|text| text.chars().next_back());
    let after = text.get(at + c.len_utf8()..).and_then(|text| text.chars().next());
    joins(before) && joins(after)
}

/// The surroundings of the first character that is removed.
fn first_removed(text: &str) -> Option<String> {
    let (at, _) = removed(text).next()?;
    let c = text.get(at..)?.chars().next()?;
    let mut before: Vec<char> = text.get(..at)?.chars().rev().take(AROUND).collect();
    before.reverse();
    let after = text.get(at + c.len_utf8()..)?.chars().take(AROUND).collect::<String>();
    let after = without(&after).unwrap_or(after);
    Some(format!("{}<U+{:04X}>{after}", before.into_iter().collect::<String>(), u32::from(c)))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;
    use crate::data::example::{Cut, Edge, Role};

    #[test]
    fn what_nobody_sees_goes_and_what_code_needs_stays() {
        assert_eq!(without("\u{feff}a\u{200b}b\u{7}c\u{85}").unwrap(), "abc");
        assert_eq!(without("a\r\nb\rc\u{c}d").unwrap(), "a\nb\nc\nd");
        let code = "def f(x):\n\tif x:\n\t    return  'é e\u{301} \u{a0}'\n";
        assert_eq!(without(code), None);
        assert_eq!(without(""), None);
    }

    #[test]
    fn wherever_a_character_stands_it_goes() {
        for at in 0..4 * BLOCK {
            let before = "é\ta".repeat(at / 2 % 2) + &"b".repeat(at);
            assert_eq!(without(&format!("{before}\u{200b}é")).unwrap(), format!("{before}é"));
            assert_eq!(without(&format!("{before}é")), None);
        }
    }

    #[test]
    fn joiners_stay_where_a_script_or_an_emoji_needs_them() {
        for text in ["می\u{200c}خواهم", "👩\u{200d}💻", "ក\u{200b}ខ"] {
            assert_eq!(without(text), None, "{text}");
        }
        assert_eq!(without("co\u{200d}op \u{200c}👩").unwrap(), "coop 👩");
        assert_eq!(without("\u{202e}abc\u{2066}").unwrap(), "abc");
    }

    #[test]
    fn cuts_and_question_move_with_the_text() {
        let content = "\u{feff} Sum\u{200b} up.\n\nA \u{7}long\u{200b} text. \u{feff}";
        let place = |part: &str| content.find(part).unwrap();
        let mut example = Example {
            messages: vec![Message::new(Role::User, content), Message::new(Role::Assistant, "B\u{200b}.")],
            document: "a\u{200b}".to_string(),
            file: 0,
            record: 7,
            question: place(" Sum")..place("\n\nA"),
            cuts: vec![Cut { message: 0, bytes: place("A ")..place(" \u{feff}"), edge: Edge::Tail }],
        };
        let mut cleaned = Cleaned::default();
        cleaned.clean(&mut example);
        let said = &example.messages[0].content;
        assert_eq!(said, "Sum up.\n\nA long text.");
        assert_eq!(&said[example.question.clone()], "Sum up.");
        assert_eq!(&said[example.cuts[0].bytes.clone()], "A long text.");
        assert_eq!((example.messages[1].content.as_str(), example.document.as_str()), ("B.", "a"));
        assert_eq!(
            (cleaned.examples, cleaned.byte_order_marks, cleaned.zero_width, cleaned.control),
            (1, 2, 3, 1)
        );
        assert_eq!(cleaned.shown[0].record, 7);
        assert!(cleaned.shown[0].text.starts_with("<U+FEFF> Sum up."), "{:?}", cleaned.shown);
    }
}
