//! Text to tokens: the tokenizer and the chat template of a model, with the mask of what is supervised.

use std::ops::Range;

use anyhow::{Context as _, Result, anyhow};
use sha2::{Digest as _, Sha256};
use tokenizers::{DecoderWrapper, Tokenizer};

use super::example::Message;
use super::template::{ChatTemplate, Conversation, RenderedChat};
use crate::error::user_error;
use crate::hex::hex;
use crate::recipe::TemplateSpec;

/// What a base model brings to turn messages into tokens; read by `checkpoint::base`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TokenizerFiles {
    /// `tokenizer.json`, or the same rebuilt from GGUF metadata.
    pub tokenizer_json: Vec<u8>,
    /// The Jinja chat template, when the model has one.
    pub chat_template: Option<String>,
    /// Beginning-of-text token, as text.
    pub bos_token: Option<String>,
    /// End token, as text: what closes a response.
    pub eos_token: Option<String>,
    /// Padding token, as text.
    pub pad_token: Option<String>,
    /// Ids that end generation (`generation_config.json`, else the end token).
    pub eos_token_ids: Vec<u32>,
}

/// A chat as token ids, with what of it is supervised.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether a token is supervised: the tokens of each assistant turn and the one that closes it.
    pub loss_mask: Vec<bool>,
}

/// A chat as text and as tokens, with the bytes of the text that each token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EncodedChat {
    pub chat: RenderedChat,
    pub encoded: Encoded,
    /// Bytes of `chat.text` of each token.
    pub spans: Vec<Range<usize>>,
}

/// A model's tokenizer and chat template, with the recipe's choices made.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    eos_token_ids: Vec<u32>,
    tokens: TokenTable,
    hash: String,
}

impl ChatTokenizer {
    /// Builds the tokenizer and compiles the template that `spec` chooses.
    ///
    /// # Errors
    /// When `tokenizer.json` is damaged, names no end token that the vocabulary holds, or the template does not compile.
    pub fn new(files: &TokenizerFiles, spec: &TemplateSpec) -> Result<Self> {
        let mut tokenizer = Tokenizer::from_bytes(&files.tokenizer_json)
            .map_err(|error| anyhow!("{error}"))
            .context("the model's `tokenizer.json` cannot be read")?;
        // Length is ours to judge; a file may carry the settings of the run that saved it.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| anyhow!("{error}"))?;
        let eos_token_ids = end_ids(files, &tokenizer)?;
        let end_tokens = eos_token_ids.iter().filter_map(|id| tokenizer.id_to_token(*id)).collect();
        let template = ChatTemplate::new(files, spec, end_tokens)?;
        let tokens = TokenTable::new(&tokenizer)?;
        Ok(Self { template, eos_token_ids, tokens, hash: content_hash(files, spec)?, tokenizer })
    }

    /// Messages as text; with `add_generation_prompt`, up to where the assistant speaks.
    ///
    /// # Errors
    /// When the template refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_conversation(Conversation { messages, add_generation_prompt, ..Conversation::default() })
    }

    /// As [`ChatTokenizer::render`], with tools or documents for templates that know them.
    ///
    /// # Errors
    /// When the template refuses the messages.
    pub fn render_conversation(&self, conversation: Conversation<'_>) -> Result<String> {
        self.template.render(conversation)
    }

    /// A whole chat as tokens, with what is supervised.
    ///
    /// # Errors
    /// When the template refuses the messages, or the closing token of a response would not be supervised.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Encoded> {
        Ok(self.encode_spans(messages)?.encoded)
    }

    /// As [`ChatTokenizer::encode_chat`], with what is needed to see where the tokens lie in the text.
    pub(crate) fn encode_spans(&self, messages: &[Message]) -> Result<EncodedChat> {
        let chat = self.template.render_supervised(messages)?;
        let (mut ids, mut spans) = self.encode_with_spans(&chat.text)?;
        if chat.supervised.iter().any(|turn| is_straddled(turn, &spans)) {
            // A token that joins the header's last bytes with the response's first would never meet the model
            // again: in use the header is encoded alone. So it is here.
            (ids, spans) = self.encode_pieces(&chat)?;
        }
        let loss_mask = mask(&chat.supervised, &spans);
        self.check_ends(&chat, &ids, &spans)?;
        Ok(EncodedChat { chat, encoded: Encoded { ids, loss_mask }, spans })
    }

    /// Messages up to where the assistant speaks, as tokens.
    ///
    /// # Errors
    /// When the template refuses the messages.
    pub fn encode_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.encode_text(&self.render(messages, true)?)
    }

    /// Text as tokens; nothing is added, special tokens are known by their text.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| anyhow!("{error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Texts as tokens, in parallel, as the tokenizers library does it by itself: the measure of `prepare`'s speed.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_batch(&self, texts: Vec<String>) -> Result<Vec<Vec<u32>>> {
        let encodings = self.tokenizer.encode_batch(texts, false).map_err(|error| anyhow!("{error}"))?;
        Ok(encodings.iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// Tokens as text; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.tokenizer.decode(ids, skip_special).map_err(|error| anyhow!("{error}"))
    }

    /// The bytes that a token adds to the text; empty for an id that is none.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.tokens.bytes(id)
    }

    /// Whether a token is a mark of the template rather than text.
    pub fn is_special(&self, id: u32) -> bool {
        self.tokens.is_special(id)
    }

    /// Ids that end a response; at least one.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// SHA-256 over tokenizer, template and the recipe's choices, in hex: two datasets with the same one speak the same tokens.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    fn encode_with_spans(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let fast = self.encode_text(text)?;
        // A byte-level tokenizer loses nothing, so the tokens' own lengths say where they lie; to ask the
        // library for offsets costs a fifth of the encoding.
        if let Some(spans) = self.tokens.tile(&fast, text) {
            return Ok((fast, spans));
        }
        let encoding = self.tokenizer.encode(text, false).map_err(|error| anyhow!("{error}"))?;
        let spans = encoding.get_offsets().iter().map(|(start, end)| *start..*end).collect();
        Ok((encoding.get_ids().to_vec(), spans))
    }

    fn encode_pieces(&self, chat: &RenderedChat) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        let bounds = chat.supervised.iter().flat_map(|turn| [turn.start, turn.end]);
        let mut from = 0;
        for to in bounds.chain([chat.text.len()]) {
            let (piece_ids, piece_spans) = self.encode_with_spans(&chat.text[from..to])?;
            ids.extend(piece_ids);
            spans.extend(piece_spans.into_iter().map(|span| span.start + from..span.end + from));
            from = to;
        }
        Ok((ids, spans))
    }

    /// Refuses a chat one of whose responses does not end with a token that ends generation.
    fn check_ends(&self, chat: &RenderedChat, ids: &[u32], spans: &[Range<usize>]) -> Result<()> {
        for turn in &chat.supervised {
            let after = spans.partition_point(|span| span.end <= turn.end);
            let closing = after.checked_sub(1).and_then(|at| ids.get(at));
            if !closing.is_some_and(|id| self.eos_token_ids.contains(id)) {
                return Err(anyhow!(
                    "a response does not end with an end token of the vocabulary: its end would not be learned"
                ));
            }
        }
        Ok(())
    }
}

fn is_straddled(turn: &Range<usize>, spans: &[Range<usize>]) -> bool {
    [turn.start, turn.end].into_iter().any(|bound| {
        let first_beyond = spans.partition_point(|span| span.end <= bound);
        spans.get(first_beyond).is_some_and(|span| span.start < bound)
    })
}

fn mask(supervised: &[Range<usize>], spans: &[Range<usize>]) -> Vec<bool> {
    let mut loss_mask = vec![false; spans.len()];
    for turn in supervised {
        let first = spans.partition_point(|span| span.start < turn.start);
        let after = spans.partition_point(|span| span.end <= turn.end);
        if let Some(turn_mask) = loss_mask.get_mut(first..after) {
            turn_mask.fill(true);
        }
    }
    loss_mask
}

fn end_ids(files: &TokenizerFiles, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut ids = files.eos_token_ids.clone();
    if let Some(token) = &files.eos_token {
        let id = tokenizer
            .token_to_id(token)
            .ok_or_else(|| anyhow!("the end token `{token}` is not in the model's vocabulary"))?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids.retain(|id| tokenizer.id_to_token(*id).is_some());
    if ids.is_empty() {
        return Err(anyhow!("the model names no end token: a response could not be closed"));
    }
    Ok(ids)
}

fn content_hash(files: &TokenizerFiles, spec: &TemplateSpec) -> Result<String> {
    let choices = serde_json::to_vec(spec)?;
    let text = |text: &Option<String>| text.clone().unwrap_or_default().into_bytes();
    let parts = [
        files.tokenizer_json.clone(),
        text(&files.chat_template),
        text(&files.bos_token),
        text(&files.eos_token),
        choices,
    ];
    let mut hash = Sha256::new();
    for part in &parts {
        // The length keeps two parts from passing for one.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    Ok(hex(&hash.finalize()))
}

/// The bytes of every token, end to end.
#[derive(Debug)]
struct TokenTable {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
    special: Vec<bool>,
    /// The tokens of a text, joined, are the text.
    lossless: bool,
    /// The first token's leading space is no part of the text.
    strips_first_space: bool,
}

/// Ids of a vocabulary lie below this. The largest that models use has some 260,000.
const MOST_IDS: usize = 1 << 24;

impl TokenTable {
    fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let spelling = Spelling::of(tokenizer.get_decoder());
        let last = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        let size = last.as_ref().map_or(0, |(_, id)| *id as usize + 1);
        if let Some((token, id)) = last.filter(|_| size > MOST_IDS) {
            return Err(user_error(
                format!(
                    "in the model's `tokenizer.json`, token `{token}` has id {id}, expected one below {MOST_IDS}"
                ),
                "fetch the model again",
            ));
        }
        let added = tokenizer.get_added_tokens_decoder();
        let mut table = Self {
            bytes: Vec::with_capacity(size * 8),
            ends: Vec::with_capacity(size),
            special: Vec::with_capacity(size),
            lossless: spelling == Spelling::ByteLevel && tokenizer.get_normalizer().is_none(),
            strips_first_space: matches!(spelling, Spelling::Metaspace { strips_first_space: true }),
        };
        for id in 0..size as u32 {
            match (added.get(&id), tokenizer.id_to_token(id)) {
                (Some(token), _) => table.push(token.content.as_bytes(), token.special),
                (None, Some(token)) => table.push(&spelling.bytes(&token), false),
                (None, None) => table.push(b"", false),
            }
        }
        Ok(table)
    }

    fn push(&mut self, bytes: &[u8], special: bool) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.special.push(special);
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    fn bytes(&self, id: u32) -> &[u8] {
        let at = id as usize;
        let start = at.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.ends.get(at).and_then(|end| self.bytes.get(start..*end)).unwrap_or_default()
    }

    fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Lays the tokens side by side; `None` where they do not make up the text.
    fn tile(&self, ids: &[u32], text: &str) -> Option<Vec<Range<usize>>> {
        if !self.lossless {
            return None;
        }
        let mut spans = Vec::with_capacity(ids.len());
        let mut end = 0;
        for id in ids {
            let bytes = self.bytes(*id);
            let start = end;
            end += bytes.len();
            if text.as_bytes().get(start..end) != Some(bytes) {
                return None;
            }
            spans.push(start..end);
        }
        (end == text.len()).then_some(spans)
    }
}

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// Each byte is a printable character, as GPT-2 does it.
    ByteLevel,
    /// A space is `▁` and a byte that no token covers is `<0x0A>`, as SentencePiece does it.
    Metaspace { strips_first_space: bool },
}

impl Spelling {
    fn of(decoder: Option<&DecoderWrapper>) -> Self {
        match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => Self::ByteLevel,
            Some(DecoderWrapper::Sequence(sequence)) => {
                let parts = sequence.get_decoders();
                if parts.iter().any(|part| matches!(part, DecoderWrapper::ByteLevel(_))) {
                    return Self::ByteLevel;
                }
                let strips = |part: &DecoderWrapper| {
                    matches!(part, DecoderWrapper::Strip(_) | DecoderWrapper::Metaspace(_))
                };
                Self::Metaspace { strips_first_space: parts.iter().any(strips) }
            }
            Some(DecoderWrapper::Metaspace(_)) => Self::Metaspace { strips_first_space: true },
            _ => Self::Metaspace { strips_first_space: false },
        }
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => token
                .chars()
                .map(byte_of)
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| token.as_bytes().to_vec()),
            Self::Metaspace { .. } => match fallback_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
        }
    }
}

/// The byte that a character of a byte-level vocabulary stands for.
///
/// GPT-2 keeps printable bytes as the Latin-1 characters they are; the other 68 take U+0100 and on, in order.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    let is_printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if is_printable(code) {
        return u8::try_from(code).ok();
    }
    let rank = code.checked_sub(0x100)? as usize;
    (0..=0xff_u32).filter(|byte| !is_printable(*byte)).nth(rank).and_then(|byte| u8::try_from(byte).ok())
}

/// The byte of `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Turns tokens into text one by one, holding back bytes until they make up characters.
///
/// What it returns, joined, is what [`ChatTokenizer::decode`] says of all the tokens, special ones skipped.
#[derive(Debug, Clone, Default)]
pub struct StreamDecoder {
    pending: Vec<u8>,
    has_begun: bool,
}

impl StreamDecoder {
    /// Begins a text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a token and returns the text that became whole; often a word, sometimes nothing.
    pub fn push(&mut self, tokenizer: &ChatTokenizer, id: u32) -> String {
        if tokenizer.is_special(id) {
            return String::new();
        }
        let mut bytes = tokenizer.token_bytes(id);
        if !self.has_begun && tokenizer.tokens.strips_first_space {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.has_begun = true;
        self.pending.extend_from_slice(bytes);
        self.take_whole()
    }

    /// Returns what was held back, with U+FFFD for bytes that are no UTF-8.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }

    fn take_whole(&mut self) -> String {
        let whole = self.pending.len() - unfinished_tail(&self.pending);
        let rest = self.pending.split_off(whole);
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending = rest;
        text
    }
}

/// How many bytes at the end may be the beginning of a character.
fn unfinished_tail(bytes: &[u8]) -> usize {
    for length in 1..=3.min(bytes.len()) {
        let tail = &bytes[bytes.len() - length..];
        match std::str::from_utf8(tail) {
            // `error_len` is absent where more bytes could still complete the character.
            Err(error) if error.valid_up_to() == 0 && error.error_len().is_none() => return length,
            _ => {}
        }
    }
    0
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn ids_without_measure_are_refused() {
        let told = |id: usize| {
            let json =
                format!(r#"{{"model":{{"type":"WordLevel","vocab":{{"a":0,"b":{id}}},"unk_token":"a"}}}}"#);
            TokenTable::new(&Tokenizer::from_bytes(json.as_bytes()).unwrap()).map(|table| table.ends.len())
        };
        assert_eq!(told(7).unwrap(), 8);
        let error = crate::error::render(&told(2_999_999_924).unwrap_err());
        assert!(error.contains("token `b` has id 2999999924"), "{error}");
    }

    #[test]
    fn every_byte_has_its_character() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('a')), (Some(b' '), Some(b'\n'), Some(b'a')));
    }

    #[test]
    fn bytes_are_held_back_only_while_they_may_become_a_character() {
        let euro = "€".as_bytes();
        assert_eq!(unfinished_tail(&euro[..1]), 1);
        assert_eq!(unfinished_tail(&euro[..2]), 2);
        assert_eq!(unfinished_tail(euro), 0);
        assert_eq!(unfinished_tail(b"a\xff"), 0);
        assert_eq!(unfinished_tail(b"\xf0\x9f\x98"), 3);
        assert_eq!(unfinished_tail(b"\x80\x80\x80"), 0);
        assert_eq!(unfinished_tail(b""), 0);
    }

    #[test]
    fn a_token_across_a_bound_is_seen() {
        let spans = [0..3, 3..6, 6..9];
        assert!(!is_straddled(&(3..9), &spans));
        assert!(is_straddled(&(4..9), &spans));
        assert!(is_straddled(&(3..7), &spans));
        assert_eq!(mask(std::slice::from_ref(&(3..6)), &spans), [false, true, false]);
    }

    #[test]
    fn sentencepiece_spelling_is_read() {
        let spelling = Spelling::Metaspace { strips_first_space: true };
        assert_eq!(spelling.bytes("▁the"), b" the");
        assert_eq!(spelling.bytes("<0x0A>"), b"\n");
        assert_eq!(spelling.bytes("<0x0>"), b"<0x0>");
    }
}
