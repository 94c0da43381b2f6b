//! `/v1/chat/completions` and `/v1/models`.

use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::scripted::{Say, Scripted};
use crate::{Reply, get, post, service};

const PATH: &str = "/v1/chat/completions";

fn ask(extra: Value) -> Value {
    let mut body = json!({"model": "test-model", "messages": [{"role": "user", "content": "Hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The chunks of a stream, which must end with `[DONE]`.
fn chunks(reply: &Reply) -> Vec<Value> {
    let mut events = reply.events();
    assert_eq!(events.pop().unwrap(), (String::new(), "[DONE]".to_string()));
    events
        .iter()
        .map(|(name, data)| {
            assert_eq!(name, "");
            serde_json::from_str(data).unwrap()
        })
        .collect()
}

#[tokio::test]
async fn a_whole_answer_has_openai_s_shape() {
    let reply =
        post(&service(Scripted::says("Hello, wörld.")), PATH, ask(json!({"user": "u", "store": false})))
            .await;
    assert_eq!(reply.status, StatusCode::OK);
    let body = reply.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("test-model")));
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    let message = json!({"role": "assistant", "content": "Hello, wörld.", "refusal": null});
    assert_eq!(
        body["choices"],
        json!([{"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"}])
    );
    // <|user|> H i <|end|> <|assistant|>, and a token for each byte.
    assert_eq!(body["usage"], json!({"prompt_tokens": 5, "completion_tokens": 14, "total_tokens": 19}));
}

#[tokio::test]
async fn a_stream_is_role_pieces_end_usage_done() {
    let extra = json!({"stream": true, "stream_options": {"include_usage": true}});
    let reply = post(&service(Scripted::says("Hey")), PATH, ask(extra)).await;
    assert_eq!(reply.status, StatusCode::OK);
    let chunks = chunks(&reply);
    let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"]).collect();
    let choice = |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
    assert_eq!(*choices[0], choice(json!({"role": "assistant", "content": ""}), Value::Null));
    assert_eq!(*choices[1], choice(json!({"content": "H"}), Value::Null));
    assert_eq!(*choices[4], choice(json!({}), json!("stop")));
    assert_eq!(*choices[5], json!([]));
    assert_eq!(chunks.len(), 6);
    assert!(chunks[..5].iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    assert_eq!(chunks[5]["usage"]["total_tokens"], 8);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk")
    );
}

#[tokio::test]
async fn usage_comes_only_when_asked_for() {
    let reply = post(&service(Scripted::says("Hey")), PATH, ask(json!({"stream": true}))).await;
    assert!(chunks(&reply).iter().all(|chunk| chunk.get("usage").is_none()));
    let refused =
        post(&service(Scripted::says("x")), PATH, ask(json!({"stream_options": {"include_usage": true}})))
            .await;
    assert_eq!(
        (refused.status, refused.json()["error"]["param"].clone()),
        (StatusCode::BAD_REQUEST, json!("stream_options"))
    );
}

#[tokio::test]
async fn a_stream_never_splits_a_character() {
    let text = "aé€😀👨‍👩‍👧\u{1f1e9}\u{1f1ea}z";
    let reply = post(&service(Scripted::says(text)), PATH, ask(json!({"stream": true}))).await;
    let pieces: Vec<String> = chunks(&reply)
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_string))
        .collect();
    assert!(pieces.iter().all(|piece| piece.chars().count() <= 1 && !piece.contains('\u{fffd}')));
    assert_eq!(pieces.concat(), text);
}

#[tokio::test]
async fn bytes_that_are_no_text_are_replaced_not_lost() {
    let model = || Scripted::new(Say::Bytes(b"a\xffb\xe2\x82".to_vec()));
    let whole = post(&service(model()), PATH, ask(json!({}))).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], "a\u{fffd}b\u{fffd}");
    let reply = post(&service(model()), PATH, ask(json!({"stream": true}))).await;
    let text: String = chunks(&reply)
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_string))
        .collect();
    assert_eq!(text, "a\u{fffd}b\u{fffd}");
}

#[tokio::test]
async fn stop_strings_end_the_answer_and_are_not_told() {
    for stream in [false, true] {
        let extra = json!({"stop": ["\n\nQ:", "€!"], "stream": stream});
        let reply = post(&service(Scripted::says("One.\n\nQ: two")), PATH, ask(extra.clone())).await;
        let (text, reason) = if stream {
            let chunks = chunks(&reply);
            let text: String = chunks
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_string))
                .collect();
            (text, chunks.last().unwrap()["choices"][0]["finish_reason"].clone())
        } else {
            let choice = &reply.json()["choices"][0];
            (choice["message"]["content"].as_str().unwrap().to_string(), choice["finish_reason"].clone())
        };
        assert_eq!((text.as_str(), reason), ("One.", json!("stop")));
    }
    // What only begins like one is told, also at the very end.
    let reply = post(&service(Scripted::says("One.\n\nQ")), PATH, ask(json!({"stop": "\n\nQ:"}))).await;
    assert_eq!(reply.json()["choices"][0]["message"]["content"], "One.\n\nQ");
}

#[tokio::test]
async fn a_stop_string_ends_the_generation_too() {
    let extra = json!({"stop": "def", "max_tokens": 1900});
    let body = post(&service(Scripted::new(Say::Forever)), PATH, ask(extra)).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "abc");
    assert_eq!(body["usage"]["completion_tokens"], 6);
}

#[tokio::test]
async fn the_limit_ends_the_answer() {
    for name in ["max_tokens", "max_completion_tokens"] {
        let body = post(&service(Scripted::new(Say::Forever)), PATH, ask(json!({name: 3}))).await.json();
        assert_eq!(body["choices"][0]["message"]["content"], "abc");
        assert_eq!(body["choices"][0]["finish_reason"], "length");
    }
    let body = post(&service(Scripted::new(Say::Forever)), PATH, ask(json!({}))).await.json();
    assert_eq!(body["usage"]["completion_tokens"], 400);
    let body =
        post(&service(Scripted::new(Say::Forever)), PATH, ask(json!({"max_tokens": 100_000}))).await.json();
    assert_eq!(body["usage"]["total_tokens"], 2000);
}

#[tokio::test]
async fn messages_reach_the_template() {
    let messages = json!([
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}], "name": "n"},
        {"role": "assistant", "content": "C", "tool_calls": null},
        {"role": "user", "content": "D"},
    ]);
    let body =
        post(&service(Scripted::new(Say::Echo)), PATH, ask(json!({"messages": messages}))).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "SABCD");
}

#[tokio::test]
async fn the_seed_decides_the_draw_and_is_optional() {
    let all = json!({"temperature": 2, "top_p": 0.5, "seed": -7});
    assert_eq!(post(&service(Scripted::says("x")), PATH, ask(all)).await.status, StatusCode::OK);
    let none = json!({"temperature": 0, "top_p": 0, "seed": null});
    assert_eq!(post(&service(Scripted::says("x")), PATH, ask(none)).await.status, StatusCode::OK);
}

#[tokio::test]
async fn what_is_not_supported_or_wrong_names_its_field() {
    let message = |value: Value| json!({"messages": [value]});
    let cases = [
        (json!({"n": 2}), "n", "`n` is 2: this server does not support it"),
        (json!({"logprobs": true}), "logprobs", "does not support"),
        (json!({"tools": [{"type": "function"}]}), "tools", "does not support"),
        (json!({"response_format": {"type": "json_object"}}), "response_format", "does not support"),
        (json!({"presence_penalty": 0.5}), "presence_penalty", "does not support"),
        (json!({"logit_bias": {"5": 1}}), "logit_bias", "does not support"),
        (json!({"audio": {}}), "audio", "does not support"),
        (json!({"repetition_penalty": 1.1}), "repetition_penalty", "unknown field `repetition_penalty`"),
        (
            json!({"temperature": "hot"}),
            "temperature",
            "`temperature` is \"hot\", expected a number from 0 to 2",
        ),
        (json!({"temperature": -0.1}), "temperature", "`temperature` is -0.1, expected"),
        (json!({"temperature": 2.5}), "temperature", "expected a number from 0 to 2"),
        (json!({"top_p": 1.5}), "top_p", "expected a number from 0 to 1"),
        (json!({"max_tokens": 0}), "max_tokens", "`max_tokens` is 0, expected a whole number of 1 or more"),
        (json!({"max_tokens": -1}), "max_tokens", "expected a whole number of 1 or more"),
        (json!({"max_completion_tokens": 1.5}), "max_completion_tokens", "expected a whole number"),
        (json!({"seed": "x"}), "seed", "expected a whole number"),
        (json!({"stream": 1}), "stream", "expected true or false"),
        (json!({"stop": [1]}), "stop", "`stop` is not a string or an array of strings"),
        (json!({"stop": ["a", ""]}), "stop", "holds an empty string"),
        (json!({"stop": vec!["a"; 17]}), "stop", "has 17 strings"),
        (json!({"messages": []}), "messages", "`messages` is empty"),
        (json!({"messages": null}), "messages", "`messages` is missing"),
        (json!({"messages": "Hi"}), "messages", "expected an array of messages"),
        (message(json!("Hi")), "messages[0]", "is no object"),
        (message(json!({"content": "x"})), "messages[0].role", "is missing"),
        (message(json!({"role": "tool", "content": "x"})), "messages[0].role", "is `tool`"),
        (message(json!({"role": "user"})), "messages[0].content", "is missing"),
        (
            message(json!({"role": "user", "content": [{"type": "image_url"}]})),
            "messages[0].content",
            "type `image_url`",
        ),
        (
            message(json!({"role": "user", "content": [{"type": "text"}]})),
            "messages[0].content",
            "without `text`",
        ),
        (
            message(json!({"role": "assistant", "content": "", "tool_calls": [{}]})),
            "messages[0].tool_calls",
            "is set",
        ),
        (json!({"stream": true, "stream_options": {"x": 1}}), "x", "unknown field `x`"),
        (message(json!({"role": "user", "content": "x".repeat(2000)})), "messages", "the context holds 2000"),
        (
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}),
            "messages",
            "the system message is not the first",
        ),
    ];
    let service = service(Scripted::says("x"));
    for (extra, param, part) in cases {
        let reply = post(&service, PATH, ask(extra.clone())).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{extra}: {}", reply.text);
        let (error, text) = (reply.json()["error"].clone(), reply.error());
        assert!(text.contains(part), "`{part}` is not in `{text}`");
        assert_eq!(
            (&error["param"], &error["type"]),
            (&json!(param), &json!("invalid_request_error")),
            "{text}"
        );
    }
    assert_eq!(
        post(&service, PATH, ask(json!({"messages": [{"role": "user", "content": "x".repeat(2000)}]})))
            .await
            .json()["error"]["code"],
        "context_length_exceeded"
    );
}

#[tokio::test]
async fn models_are_listed_and_others_are_not_found() {
    let service = service(Scripted::says("x"));
    let list = get(&service, "/v1/models").await.json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("test-model")));
    assert_eq!(get(&service, "/v1/models/test-model").await.json(), list["data"][0]);
    for reply in
        [get(&service, "/v1/models/other").await, post(&service, PATH, ask(json!({"model": "other"}))).await]
    {
        assert_eq!(reply.status, StatusCode::NOT_FOUND);
        assert_eq!(reply.json()["error"]["code"], "model_not_found");
        assert!(reply.error().contains("this server has `test-model`"));
    }
    let no_text = get(&service, "/v1/models/%ff").await;
    assert_eq!(no_text.status, StatusCode::BAD_REQUEST);
    assert!(no_text.error().contains("UTF-8"), "{}", no_text.text);
}

#[tokio::test]
async fn a_failing_engine_is_told_before_and_in_the_stream() {
    let model = || Scripted::says("Hello").failing_after(2);
    let whole = post(&service(model()), PATH, ask(json!({}))).await;
    assert_eq!(whole.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(whole.error().contains("scripted failure"));
    let stream = post(&service(model()), PATH, ask(json!({"stream": true}))).await;
    let events = stream.events();
    let last: Value = serde_json::from_str(&events.last().unwrap().1).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("scripted failure"));
}
