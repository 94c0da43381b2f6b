//! An example as tokens, shortened until it fits: context goes first, the response and its end token never.

use std::ops::Range;

use anyhow::Result;

use super::example::{Cut, Edge, Example, Message, Role};
use super::tokenizer::{ChatTokenizer, Encoded, EncodedChat};

/// An example that fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fitted {
    /// Its tokens.
    pub encoded: Encoded,
    /// Context was cut off.
    pub shortened: bool,
    /// Where its messages lie among the tokens; one that cannot be told apart from the template is left out.
    pub turns: Vec<Turn>,
}

/// The tokens of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// The message, counted from 0.
    pub message: u32,
    /// Who speaks.
    pub role: Role,
    /// Its first token.
    pub start: u32,
    /// The token after its last; an assistant's turn includes the token that closes it.
    pub end: u32,
}

/// Encodes an example and cuts its context until it has at most `capacity` tokens; `None` where that cannot be.
///
/// # Errors
/// When the template refuses the example, or the end of a response would not be learned.
pub fn fit(tokenizer: &ChatTokenizer, example: &Example, capacity: usize) -> Result<Option<Fitted>> {
    let whole = tokenizer.encode_spans(&example.messages)?;
    if whole.encoded.ids.len() <= capacity {
        return Ok(Some(fitted(whole, &example.messages, false)));
    }
    shorten(tokenizer, example.clone(), whole, capacity)
}

fn fitted(chat: EncodedChat, messages: &[Message], shortened: bool) -> Fitted {
    Fitted { turns: turns(&chat, messages), encoded: chat.encoded, shortened }
}

/// Where messages lie: the assistant's are known from the mask, the others are looked for between those.
fn turns(chat: &EncodedChat, messages: &[Message]) -> Vec<Turn> {
    let text = chat.chat.text.as_str();
    let mut supervised = chat.chat.supervised.iter();
    let mut turns = Vec::with_capacity(messages.len());
    let (mut from, mut until) = (0, supervised.next());
    for (message, said) in (0..).zip(messages) {
        let bytes = if said.role == Role::Assistant {
            let bytes = until.cloned();
            until = supervised.next();
            bytes
        } else {
            let limit = until.map_or(text.len(), |turn| turn.start);
            said_within(text, from..limit, said.content.trim())
        };
        let Some(bytes) = bytes else { continue };
        from = bytes.end;
        let start = chat.spans.partition_point(|span| span.end <= bytes.start);
        let end = chat.spans.partition_point(|span| span.start < bytes.end);
        if let (Ok(start), Ok(end)) = (u32::try_from(start), u32::try_from(end)) {
            turns.push(Turn { message, role: said.role, start, end });
        }
    }
    turns
}

/// Where a text stands, by itself between marks of the template or else only once; a short one may be part of a word
/// that the template says.
fn said_within(text: &str, range: Range<usize>, said: &str) -> Option<Range<usize>> {
    let within = text.get(range.clone()).filter(|_| !said.is_empty())?;
    let found: Vec<usize> = within.match_indices(said).map(|(at, _)| range.start + at).collect();
    let stands_alone = |at: &usize| {
        let before = text.get(..*at).and_then(|text| text.chars().next_back());
        let after = text.get(at + said.len()..).and_then(|text| text.chars().next());
        before.is_none_or(|c| matches!(c, '>' | '\n' | ']' | ':'))
            && after.is_none_or(|c| matches!(c, '<' | '\n' | '['))
    };
    let alone: Vec<usize> = found.iter().copied().filter(stands_alone).collect();
    match (alone.as_slice(), found.as_slice()) {
        ([at], _) | ([], [at]) => Some(*at..at + said.len()),
        _ => None,
    }
}

fn shorten(
    tokenizer: &ChatTokenizer,
    mut example: Example,
    mut encoded: EncodedChat,
    capacity: usize,
) -> Result<Option<Fitted>> {
    let mut cuts = std::mem::take(&mut example.cuts).into_iter().peekable();
    while let Some(mut cut) = cuts.next() {
        let is_last = cuts.peek().is_none();
        while encoded.encoded.ids.len() > capacity && !cut.bytes.is_empty() {
            let excess = encoded.encoded.ids.len() - capacity;
            cut.bytes = give_up(&mut example, &cut, &encoded, excess);
            if is_last && cut.bytes.is_empty() {
                // A question about nothing would teach to make things up.
                return Ok(None);
            }
            encoded = tokenizer.encode_spans(&example.messages)?;
        }
        if encoded.encoded.ids.len() <= capacity {
            return Ok(Some(fitted(encoded, &example.messages, true)));
        }
    }
    Ok(None)
}

/// Takes about `excess` tokens off the part's edge, at least one byte, and returns where the rest of it lies.
///
/// The encoding at hand says how many bytes those tokens are; the caller encodes again and sees whether it was enough,
/// because tokens beside a cut may part differently.
fn give_up(example: &mut Example, cut: &Cut, encoded: &EncodedChat, excess: usize) -> Range<usize> {
    let Some(message) = example.messages.get_mut(cut.message) else { return 0..0 };
    let Some(part) = message.content.get(cut.bytes.clone()) else { return 0..0 };
    let kept = kept_range(part, cut.edge, encoded, excess);
    let rest = part.get(kept).unwrap_or_default().trim().to_string();
    message.content.replace_range(cut.bytes.clone(), &rest);
    cut.bytes.start..cut.bytes.start + rest.len()
}

/// Bytes of `part` that stay when `excess` of its tokens go.
fn kept_range(part: &str, edge: Edge, encoded: &EncodedChat, excess: usize) -> Range<usize> {
    let Some(start) = encoded.chat.text.find(part) else { return 0..0 };
    let spans = &encoded.spans;
    let first = spans.partition_point(|span| span.start < start);
    let after = spans.partition_point(|span| span.end <= start + part.len());
    let inside = spans.get(first..after).unwrap_or_default();
    if inside.len() <= excess {
        return 0..0;
    }
    match edge {
        Edge::Tail => {
            let end = inside.get(inside.len() - excess).map_or(0, |span| span.start - start);
            0..part.floor_char_boundary(end.min(part.len().saturating_sub(1)))
        }
        Edge::Head => {
            let begin = inside.get(excess).map_or(part.len(), |span| span.start - start);
            part.ceil_char_boundary(begin.max(1))..part.len()
        }
    }
}
