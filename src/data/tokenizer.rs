//! Text to tokens: the tokenizer and the chat template of a model, with the mask of what is supervised.

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
