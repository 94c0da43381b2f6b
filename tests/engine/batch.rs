//! Several requests at once: who is taken up when, and who leaves.

use std::sync::{Arc, Mutex};

use granite::engine::{Engine, EngineHandle, EngineOptions, FinishReason, Request, TokenStream};

use super::request;
use super::scripted::{Counting, Gate, Steps};

/// An engine that is held still until all that is to be answered has been handed in, and the steps it makes.
fn held(batch: usize, cached_tokens: Option<usize>, model: Counting) -> (EngineHandle, Gate, Steps) {
    let (gate, steps) = (Gate::closed(), Steps::default());
    let options = EngineOptions { queue: 16, context: None, batch, cached_tokens };
    let engine = Engine::spawn(model.behind(&gate).counted(&steps), &options).unwrap();
    (engine, gate, steps)
}

fn submit(engine: &EngineHandle, requests: Vec<Request>) -> Vec<TokenStream> {
    requests.into_iter().map(|request| engine.submit(request).unwrap()).collect()
}

fn ids(streams: Vec<TokenStream>) -> Vec<Vec<u32>> {
    streams.into_iter().map(|stream| stream.wait().unwrap().ids()).collect()
}

fn steps(steps: &Steps) -> Vec<Vec<usize>> {
    std::mem::take(&mut *steps.lock().unwrap())
}

#[test]
fn places_are_taken_as_they_become_free() {
    let (engine, gate, made) = held(2, None, Counting::new(100, 64));
    let mut streams = submit(&engine, vec![request(&[10], 1)]);
    gate.wait_until_reached();
    streams.extend(submit(
        &engine,
        vec![request(&[20, 21], 4), request(&[30], 1), request(&[40, 41, 42], 2), request(&[50], 1)],
    ));
    assert_eq!((engine.batch(), engine.running(), engine.waiting()), (2, 1, 4));
    gate.open();
    assert_eq!(ids(streams), [vec![11], vec![22, 23, 24, 25], vec![31], vec![43, 44], vec![51]]);
    // The first alone; then the second beside each of the others in turn.
    assert_eq!(steps(&made), [vec![1], vec![2, 1], vec![1, 3], vec![1, 1], vec![1, 1]]);
    assert_eq!((engine.running(), engine.waiting()), (0, 0));
}

#[test]
fn prompts_share_the_room_of_a_step_and_answers_go_on_meanwhile() {
    let (engine, gate, made) = held(3, None, Counting::new(5000, 4000));
    let mut streams = submit(&engine, vec![request(&[1], 4)]);
    gate.wait_until_reached();
    let prompt = |from: u32, length: u32| -> Vec<u32> { (from..from + length).collect() };
    streams.extend(submit(&engine, vec![request(&prompt(100, 700), 1), request(&prompt(1000, 600), 1)]));
    gate.open();
    assert_eq!(ids(streams), [vec![2, 3, 4, 5], vec![800], vec![1600]]);
    assert_eq!(steps(&made), [vec![1], vec![1, 512], vec![1, 188, 324], vec![1, 276]]);
}

#[test]
fn caches_stay_within_their_tokens_and_nobody_is_passed_over() {
    let (engine, gate, made) = held(8, Some(20), Counting::new(100, 64));
    let mut streams = submit(&engine, vec![request(&[10; 8], 2)]);
    gate.wait_until_reached();
    // Ten of twenty are taken. The next one needs eleven, and the one behind it would fit, but waits its turn; the last is
    // larger than all there is, and is answered alone.
    let requests = vec![request(&[20; 10], 1), request(&[30], 1), request(&[40; 30], 1)];
    streams.extend(submit(&engine, requests));
    gate.open();
    assert_eq!(ids(streams), [vec![11, 12], vec![21], vec![31], vec![41]]);
    assert_eq!(steps(&made), [vec![8], vec![1], vec![10, 1], vec![30]]);
}

#[test]
fn who_cancels_leaves_the_others_alone() {
    let (engine, gate, _) = held(3, None, Counting::new(100, 64));
    let mut streams = submit(&engine, vec![request(&[10], 3)]);
    gate.wait_until_reached();
    streams.extend(submit(&engine, vec![request(&[20], 3), request(&[30], 3)]));
    streams[1].cancel();
    gate.open();
    let ends: Vec<_> = streams.into_iter().map(|stream| stream.wait().unwrap()).collect();
    assert_eq!(ends[1].finished.reason, FinishReason::Cancelled);
    assert!(ends[1].tokens.is_empty());
    assert_eq!((ends[0].ids(), ends[2].ids()), (vec![11, 12, 13], vec![31, 32, 33]));
}

#[test]
fn a_panic_fails_all_that_run() {
    let (engine, gate, _) = held(3, None, Counting::new(100, 64).panicking_at(21));
    let mut streams = submit(&engine, vec![request(&[10], 9)]);
    gate.wait_until_reached();
    streams.extend(submit(&engine, vec![request(&[20], 3), request(&[30], 1)]));
    gate.open();
    let mut ends = streams.into_iter().map(TokenStream::wait);
    for _ in 0..2 {
        let error = ends.next().unwrap().unwrap_err().to_string();
        assert!(error.contains("bug in granite: token 21"), "{error}");
    }
    // Answered before the panic.
    assert_eq!(ends.next().unwrap().unwrap().ids(), [31]);
    assert!(!engine.is_healthy());
}

#[test]
fn handles_may_submit_from_many_threads() {
    let options = EngineOptions { queue: 64, context: None, batch: 5, cached_tokens: Some(90) };
    let engine = Engine::spawn(Counting::new(100, 64), &options).unwrap();
    let wrong = Arc::new(Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for first in 0..8_u32 {
            let (engine, wrong) = (engine.clone(), Arc::clone(&wrong));
            scope.spawn(move || {
                for length in 1..8_u32 {
                    let stream = engine.submit(request(&vec![first; length as usize], 5)).unwrap();
                    let said = stream.wait().unwrap().ids();
                    if said != (first + 1..first + 6).collect::<Vec<_>>() {
                        wrong.lock().unwrap().push(said);
                    }
                }
            });
        }
    });
    assert_eq!(*wrong.lock().unwrap(), Vec::<Vec<u32>>::new());
}
