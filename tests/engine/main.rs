//! The engine through its handle, with models whose answers are known.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod batch;
mod decoder;
mod scripted;

use std::time::Duration;

use granite::engine::{
    Engine, EngineHandle, EngineOptions, Event, FinishReason, Request, Sampling, SubmitError, Usage,
};
use scripted::{Counting, Gate, UNALLOCATABLE};

/// One request at a time: what runs and what waits is then known.
fn options(queue: usize) -> EngineOptions {
    EngineOptions { queue, context: None, batch: 1, cached_tokens: None }
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request { prompt: prompt.to_vec(), max_tokens, sampling: Sampling::GREEDY, stop_token_ids: vec![] }
}

fn counting(queue: usize) -> EngineHandle {
    Engine::spawn(Counting::new(100, 32), &options(queue)).unwrap()
}

#[test]
fn tokens_come_in_order_and_usage_is_counted() {
    let engine = counting(1);
    let generation = engine.submit(request(&[3, 4, 5], 4)).unwrap().wait().unwrap();
    assert_eq!(generation.ids(), [6, 7, 8, 9]);
    assert_eq!(generation.finished.reason, FinishReason::Length);
    assert_eq!(generation.finished.usage, Usage { prompt_tokens: 3, completion_tokens: 4 });
    assert!(generation.tokens.iter().all(|token| token.logprob < 0.0));
}

#[test]
fn a_stop_token_ends_the_answer_and_is_not_part_of_it() {
    let engine = counting(1);
    let stop = Request { stop_token_ids: vec![50, 7], ..request(&[5], 10) };
    let generation = engine.submit(stop).unwrap().wait().unwrap();
    assert_eq!(generation.ids(), [6]);
    assert_eq!(generation.finished.reason, FinishReason::Stop);
    assert_eq!(generation.finished.usage.completion_tokens, 1);
}

#[test]
fn a_stop_token_in_the_prompt_stops_nothing() {
    let engine = counting(1);
    let stop = Request { stop_token_ids: vec![5], ..request(&[5, 5, 5], 2) };
    assert_eq!(engine.submit(stop).unwrap().wait().unwrap().ids(), [6, 7]);
}

#[test]
fn the_context_bounds_prompt_and_answer() {
    let engine = counting(1); // a context of 32
    let generation = engine.submit(request(&[1; 30], 1000)).unwrap().wait().unwrap();
    assert_eq!(generation.ids().len(), 2);
    assert_eq!(generation.finished.reason, FinishReason::Length);
    let refused = engine.submit(request(&[1; 32], 1)).unwrap_err();
    assert_eq!(refused, SubmitError::PromptTooLong { prompt: 32, context: 32 });

    let shorter = EngineOptions { context: Some(8), ..options(1) };
    let engine = Engine::spawn(Counting::new(100, 32), &shorter).unwrap();
    assert_eq!(engine.context(), 8);
    assert_eq!(engine.submit(request(&[1; 7], 9)).unwrap().wait().unwrap().ids().len(), 1);
    let longer = EngineOptions { context: Some(1000), ..options(1) };
    assert_eq!(Engine::spawn(Counting::new(100, 32), &longer).unwrap().context(), 32);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let engine = counting(1);
    let hot = Sampling { temperature: f64::NAN, ..Sampling::GREEDY };
    for (wrong, told) in [
        (request(&[], 1), "prompt is empty"),
        (request(&[1], 0), "`max_tokens` is 0"),
        (request(&[1, 100], 1), "token id 100 is beyond the model's vocabulary of 100"),
        (Request { sampling: hot, ..request(&[1], 1) }, "`temperature` is NaN"),
    ] {
        let SubmitError::Invalid(message) = engine.submit(wrong).unwrap_err() else {
            panic!("refused for another reason")
        };
        assert!(message.contains(told), "{message}");
    }
}

#[test]
fn a_long_prompt_goes_through_in_chunks_and_arrives_whole() {
    let engine = Engine::spawn(Counting::new(5000, 4000), &options(1)).unwrap();
    let prompt: Vec<u32> = (0..1500).collect();
    assert_eq!(engine.submit(request(&prompt, 2)).unwrap().wait().unwrap().ids(), [1500, 1501]);
}

#[test]
fn a_full_queue_is_an_answer() {
    let gate = Gate::closed();
    let engine = Engine::spawn(Counting::new(100, 32).behind(&gate), &options(2)).unwrap();
    let first = engine.submit(request(&[1], 2)).unwrap();
    gate.wait_until_reached();
    let waiting = [engine.submit(request(&[2], 2)).unwrap(), engine.submit(request(&[3], 2)).unwrap()];
    assert_eq!(engine.submit(request(&[4], 2)).unwrap_err(), SubmitError::Overloaded { waiting: 2 });
    assert_eq!((engine.running(), engine.waiting()), (1, 2));
    gate.open();
    assert_eq!(first.wait().unwrap().ids(), [2, 3]);
    for (stream, expected) in waiting.into_iter().zip([[3, 4], [4, 5]]) {
        let generation = stream.wait().unwrap();
        assert_eq!(generation.ids(), expected);
        assert!(generation.finished.timings.queued > Duration::ZERO);
    }
    assert_eq!(engine.submit(request(&[4], 1)).unwrap().wait().unwrap().ids(), [5]);
}

#[test]
fn readers_that_have_gone_leave_the_queue() {
    let gate = Gate::closed();
    let engine = Engine::spawn(Counting::new(100, 32).behind(&gate), &options(1)).unwrap();
    let first = engine.submit(request(&[1], 1)).unwrap();
    gate.wait_until_reached();
    drop(engine.submit(request(&[2], 1)).unwrap());
    let third = engine.submit(request(&[3], 1)).unwrap();
    gate.open();
    assert_eq!(first.wait().unwrap().ids(), [2]);
    assert_eq!(third.wait().unwrap().ids(), [4]);
}

#[test]
fn cancelling_ends_the_answer_early() {
    let gate = Gate::closed();
    let engine = Engine::spawn(Counting::new(100, 32).behind(&gate), &options(1)).unwrap();
    let stream = engine.submit(request(&[1], 20)).unwrap();
    gate.wait_until_reached();
    stream.cancel();
    gate.open();
    let generation = stream.wait().unwrap();
    assert_eq!(generation.finished.reason, FinishReason::Cancelled);
    assert!(generation.tokens.len() <= 1, "{:?}", generation.tokens);
}

#[test]
fn dropping_the_stream_frees_the_engine() {
    let model = Counting::new(100, 1_000_000).slow(Duration::from_millis(2));
    let engine = Engine::spawn(model, &options(1)).unwrap();
    let mut stream = engine.submit(request(&[1], 900_000)).unwrap();
    assert!(matches!(stream.blocking_next(), Some(Event::Token(_))));
    drop(stream);
    // Half an hour of the first request is left: the second can only be answered when that one ended.
    assert_eq!(engine.submit(request(&[7], 1)).unwrap().wait().unwrap().ids(), [8]);
}

#[test]
fn dropping_the_last_handle_cancels_what_runs_and_what_waits() {
    let model = Counting::new(100, 1_000_000).slow(Duration::from_millis(2));
    let engine = Engine::spawn(model, &options(4)).unwrap();
    let streams: Vec<_> = (0..3).map(|_| engine.submit(request(&[1], 900_000)).unwrap()).collect();
    drop(engine.clone());
    drop(engine);
    for stream in streams {
        assert_eq!(stream.wait().unwrap().finished.reason, FinishReason::Cancelled);
    }
}

#[test]
fn an_error_of_the_model_fails_one_request_only() {
    let engine = Engine::spawn(Counting::new(100, 32).failing_at(10), &options(1)).unwrap();
    let error = engine.submit(request(&[9], 5)).unwrap().wait().unwrap_err();
    assert!(error.to_string().contains("no token follows 10"), "{error}");
    assert!(engine.is_healthy());
    assert_eq!(engine.submit(request(&[3], 1)).unwrap().wait().unwrap().ids(), [4]);
}

#[test]
fn a_panic_is_told_and_ends_the_engine() {
    let gate = Gate::closed();
    let model = Counting::new(100, 32).panicking_at(10).behind(&gate);
    let engine = Engine::spawn(model, &options(1)).unwrap();
    let first = engine.submit(request(&[9], 5)).unwrap();
    gate.wait_until_reached();
    let second = engine.submit(request(&[1], 1)).unwrap();
    gate.open();
    let error = first.wait().unwrap_err().to_string();
    assert!(error.contains("bug in granite: token 10"), "{error}");
    let error = second.wait().unwrap_err().to_string();
    assert!(error.contains("failed at an earlier request"), "{error}");
    assert!(!engine.is_healthy());
    assert_eq!(engine.submit(request(&[1], 1)).unwrap_err(), SubmitError::Stopped);
}

#[test]
fn a_cache_that_cannot_be_had_fails_its_request_alone() {
    let engine = Engine::spawn(Counting::new(100, 64).with_memory(20), &options(8)).unwrap();
    let streams =
        [(3, 5), (3, 30), (4, 5)].map(|(token, most)| engine.submit(request(&[token], most)).unwrap());
    let [first, second, third] = streams.map(|stream| stream.wait());
    assert_eq!(first.unwrap().ids(), [4, 5, 6, 7, 8]);
    let error = second.unwrap_err().to_string();
    assert!(error.contains("keys and values of 31 tokens: out of memory"), "{error}");
    assert_eq!(third.unwrap().ids(), [5, 6, 7, 8, 9]);
    assert!(engine.is_healthy());
}

#[test]
fn an_allocator_that_panics_ends_the_engine_and_is_told() {
    let engine = counting(8);
    let lost = engine.submit(request(&[1], UNALLOCATABLE - 1)).unwrap();
    assert!(lost.wait().is_err());
    // The engine ends a moment after the request that it lost.
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while engine.is_healthy() && std::time::Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!engine.is_healthy());
    assert_eq!(engine.submit(request(&[1], 1)).unwrap_err(), SubmitError::Stopped);
}

#[test]
fn the_same_seed_draws_the_same_tokens() {
    let engine = Engine::spawn(Counting::new(100, 64), &options(8)).unwrap();
    let sampled = |seed| {
        let sampling = Sampling { temperature: 3.0, top_p: 0.95, top_k: Some(50), seed };
        engine.submit(Request { sampling, ..request(&[1], 40) }).unwrap().wait().unwrap().ids()
    };
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asynchronous_readers_see_every_event() {
    let engine = counting(8);
    let mut stream = engine.submit(request(&[1], 3)).unwrap();
    let mut ids = Vec::new();
    let mut ends = 0;
    while let Some(event) = stream.next().await {
        match event {
            Event::Token(token) => ids.push(token.id),
            Event::Finished(_) => ends += 1,
            Event::Failed(reason) => panic!("{reason}"),
        }
    }
    assert_eq!((ids, ends), (vec![2, 3, 4], 1));
    tokio::task::spawn_blocking(move || drop(engine)).await.unwrap();
}
