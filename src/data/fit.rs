//! An example as tokens, shortened until it fits: context goes first, the response and its end token never.

use std::ops::Range;

use anyhow::Result;

use super::example::{Cut, Edge, Example};
use super::tokenizer::{ChatTokenizer, Encoded, EncodedChat};

/// An example that fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fitted {
    /// Its tokens.
    pub encoded: Encoded,
    /// Context was cut off.
    pub shortened: bool,
}

/// Encodes an example and cuts its context until it has at most `capacity` tokens; `None` where that cannot be.
///
/// # Errors
/// When the template refuses the example, or the end of a response would not be learned.
pub fn fit(tokenizer: &ChatTokenizer, example: &Example, capacity: usize) -> Result<Option<Fitted>> {
    let whole = tokenizer.encode_spans(&example.messages)?;
    if whole.encoded.ids.len() <= capacity {
        return Ok(Some(Fitted { encoded: whole.encoded, shortened: false }));
    }
    shorten(tokenizer, example.clone(), whole, capacity)
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
            return Ok(Some(Fitted { encoded: encoded.encoded, shortened: true }));
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
