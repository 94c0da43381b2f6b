//! A model that says what it was told to, and a tokenizer with a token per byte.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use anyhow::{Result, bail};
use granite::data::tokenizer::{ChatTokenizer, TokenizerFiles};
use granite::engine::CausalLm;
use granite::model::continuation::Continuation;
use granite::recipe::TemplateSpec;
use serde_json::{Map, json};

const TEMPLATE: &str = "{% for message in messages %}{% if message.role == 'system' and not loop.first %}\
    {{ raise_exception('the system message is not the first') }}{% endif %}\
    <|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>{% endif %}";
const MARKS: [&str; 4] = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"];
const END: u32 = 256;
const ASSISTANT: u32 = 259;
const VOCABULARY: usize = 260;

/// Byte-level, as Granite's and SmolLM2's, without merges: token `n` is byte `n`, then come the marks.
pub fn tokenizer() -> ChatTokenizer {
    let vocabulary: Map<String, serde_json::Value> =
        (0..=255u8).map(|byte| (spelled(byte).to_string(), json!(byte))).collect();
    let marks: Vec<_> = MARKS.iter().enumerate().map(|(at, mark)| {
        json!({"id": 256 + at, "content": mark, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    }).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": marks, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let files = TokenizerFiles {
        tokenizer_json: file.to_string().into_bytes(),
        chat_template: Some(TEMPLATE.to_string()),
        eos_token: Some(MARKS[0].to_string()),
        ..TokenizerFiles::default()
    };
    ChatTokenizer::new(&files, &TemplateSpec::default()).unwrap()
}

/// GPT-2's spelling of a byte.
fn spelled(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&below| !printable(below)).count() as u32;
    char::from_u32(0x100 + rank).unwrap()
}

/// What the model says.
#[derive(Clone)]
pub enum Say {
    /// This, then its end.
    Bytes(Vec<u8>),
    /// The prompt again, marks left out.
    Echo,
    /// Never ends.
    Forever,
}

/// Holds the model at its first step until it is opened.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        drop(self.0.1.wait_while(self.0.0.lock().unwrap(), |open| !*open).unwrap());
    }
}

pub struct Scripted {
    say: Say,
    pause: Duration,
    gate: Option<Gate>,
    fails_after: usize,
}

impl Scripted {
    pub fn new(say: Say) -> Self {
        Self { say, pause: Duration::ZERO, gate: None, fails_after: usize::MAX }
    }

    pub fn says(text: &str) -> Self {
        Self::new(Say::Bytes(text.as_bytes().to_vec()))
    }

    pub fn slow(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }

    pub fn behind(self, gate: &Gate) -> Self {
        Self { gate: Some(gate.clone()), ..self }
    }

    pub fn failing_after(self, tokens: usize) -> Self {
        Self { fails_after: tokens, ..self }
    }

    fn next(&self, prompt: &[u32], said: usize) -> u32 {
        let byte = match &self.say {
            Say::Bytes(bytes) => bytes.get(said).copied(),
            Say::Echo => prompt.iter().filter_map(|&id| u8::try_from(id).ok()).nth(said),
            Say::Forever => Some(b'a' + (said % 26) as u8),
        };
        byte.map_or(END, u32::from)
    }
}

impl CausalLm for Scripted {
    type Cache = Vec<u32>;

    fn context(&self) -> usize {
        4000
    }

    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn new_cache(&self, _capacity: usize) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }

    fn forward_cached(&self, batch: &mut [Continuation<'_, Vec<u32>>]) -> Result<Vec<Vec<f32>>> {
        if let Some(gate) = &self.gate {
            gate.pass();
        }
        std::thread::sleep(self.pause);
        batch.iter_mut().map(|one| self.after(one.input_ids, one.cache)).collect()
    }
}

impl Scripted {
    fn after(&self, input_ids: &[u32], seen: &mut Vec<u32>) -> Result<Vec<f32>> {
        seen.extend(input_ids);
        let prompt = seen.iter().rposition(|&id| id == ASSISTANT).map_or(seen.len(), |at| at + 1);
        let said = seen.len() - prompt;
        if said >= self.fails_after {
            bail!("scripted failure");
        }
        let mut logits = vec![-50.0; VOCABULARY];
        logits[self.next(&seen[..prompt], said) as usize] = 50.0;
        Ok(logits)
    }
}
