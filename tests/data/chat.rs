//! Chats of Granite 3.1 against what the reference library renders and encodes.

use granite::data::example::{Message, Role};
use granite::data::template::Conversation;
use granite::data::tokenizer::{ChatTokenizer, StreamDecoder};
use granite::recipe::TemplateSpec;
use serde_json::Value;

use crate::fixture::{granite_tokenizer, real_data};

fn tokenizer(test: &str) -> Option<(ChatTokenizer, Value)> {
    let data = real_data(test)?;
    let golden =
        serde_json::from_slice(&std::fs::read(data.join("granite/golden_chat_and_encode.json")).unwrap())
            .unwrap();
    let spec = TemplateSpec { date: "2025-01-15".to_string(), ..TemplateSpec::default() };
    Some((ChatTokenizer::new(&granite_tokenizer(&data), &spec).unwrap(), golden))
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

#[test]
fn every_golden_chat_is_rendered_and_encoded_as_the_reference_does() {
    let Some((tokenizer, golden)) = tokenizer("golden chats") else { return };
    let cases = golden["chat"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let messages: Vec<Message> = serde_json::from_value(case["input"]["messages"].clone()).unwrap();
        let rendered = tokenizer
            .render_conversation(Conversation {
                messages: &messages,
                tools: case["input"].get("tools"),
                documents: case["input"].get("documents"),
                add_generation_prompt: case["input"]["add_generation_prompt"] == true,
            })
            .unwrap();
        assert_eq!(rendered, case["rendered"]);
        assert_eq!(tokenizer.encode_text(&rendered).unwrap(), ids(&case["ids"]));
    }
}

#[test]
fn every_golden_text_is_encoded_and_decoded_as_the_reference_does() {
    let Some((tokenizer, golden)) = tokenizer("golden texts") else { return };
    let cases = golden["encode"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let found = tokenizer.encode_text(case["text"].as_str().unwrap()).unwrap();
        assert_eq!(found, ids(&case["ids"]));
        assert_eq!(tokenizer.decode(&found, false).unwrap(), case["decoded"]);
    }
}

#[test]
fn a_golden_chat_is_supervised_from_its_answer_to_its_end_token() {
    let Some((tokenizer, golden)) = tokenizer("golden mask") else { return };
    let case = &golden["chat"][1];
    let messages: Vec<Message> = serde_json::from_value(case["input"]["messages"].clone()).unwrap();
    let encoded = tokenizer.encode_chat(&messages).unwrap();
    assert_eq!(encoded.ids, ids(&case["ids"]));
    let learned: Vec<u32> =
        encoded.ids.iter().zip(&encoded.loss_mask).filter(|(_, on)| **on).map(|(id, _)| *id).collect();
    // `SELECT count(*) FROM singer` and the end token; not the line break that follows it.
    assert_eq!(learned, [4620, 2385, 20399, 3753, 309, 10118, 0]);
}

#[test]
fn the_prompt_of_serving_is_the_beginning_of_the_chat_of_training() {
    let Some((tokenizer, _)) = tokenizer("prompt") else { return };
    let mut messages = vec![Message::new(Role::User, "  odd \n question ")];
    let prompt = tokenizer.encode_prompt(&messages).unwrap();
    messages.push(Message::new(Role::Assistant, "\n\nan answer"));
    let encoded = tokenizer.encode_chat(&messages).unwrap();
    assert_eq!(encoded.ids[..prompt.len()], prompt);
    assert_eq!(encoded.loss_mask.iter().position(|on| *on), Some(prompt.len()));
}

#[test]
fn streaming_gives_what_decoding_gives_whatever_the_tokens() {
    let Some((tokenizer, _)) = tokenizer("stream") else { return };
    let mut state = 7_u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let text = "naïve 漢字 😀🏽 and plain words";
    let mut cases = vec![tokenizer.encode_text(text).unwrap(), Vec::new()];
    // Ids below 300 are mostly single bytes, so most of these are no UTF-8.
    cases.extend((0..200).map(|_| (0..12).map(|_| random() % 300).collect()));
    for case in cases {
        let mut decoder = StreamDecoder::new();
        let mut streamed: String = case.iter().map(|id| decoder.push(&tokenizer, *id)).collect();
        streamed.push_str(&decoder.finish());
        assert_eq!(streamed, tokenizer.decode(&case, true).unwrap(), "{case:?}");
    }
}

#[test]
fn the_vocabulary_is_whole_and_the_hash_follows_the_choices() {
    let Some((tokenizer, _)) = tokenizer("vocabulary") else { return };
    assert_eq!(tokenizer.vocab_size(), 49_155);
    assert_eq!(tokenizer.eos_token_ids(), [0]);
    assert_eq!(tokenizer.token_bytes(0), b"<|end_of_text|>");
    assert!(tokenizer.token_bytes(1_000_000).is_empty());
    let data = real_data("hash").unwrap();
    let other = ChatTokenizer::new(&granite_tokenizer(&data), &TemplateSpec::default()).unwrap();
    assert_eq!(tokenizer.hash().len(), 64);
    assert_ne!(tokenizer.hash(), other.hash());
}
