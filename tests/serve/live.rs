//! Over TCP: overload, clients that go away, the end of the service.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use granite::engine::EngineHandle;
use granite::serve::run::serve;
use granite::serve::{Service, Settings};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::scripted::{Gate, Say, Scripted};
use crate::{service_with, settings};

/// A running service; `signals` counts what a shell would have sent.
struct Live {
    address: SocketAddr,
    engine: EngineHandle,
    signals: watch::Sender<u32>,
    thread: JoinHandle<anyhow::Result<()>>,
}

fn start(service: Service) -> Live {
    let (signals, receiver) = watch::channel(0);
    let engine = service.engine.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let thread = thread::spawn(move || runtime.block_on(serve(service, listener, receiver)));
    Live { address, engine, signals, thread }
}

impl Live {
    fn signal(&self) {
        self.signals.send_modify(|count| *count += 1);
    }

    fn send(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = self.connect();
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream
    }

    fn get(&self, path: &str) -> String {
        let mut stream = self.connect();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
        read(stream)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn chat(&self, extra: Value) -> TcpStream {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        self.send("/v1/chat/completions", &body)
    }

    /// Waits until `holds`; the engine needs a moment to take a request up or to let it go.
    fn until(&self, what: &str, holds: impl Fn(&EngineHandle) -> bool) {
        let started = Instant::now();
        while !holds(&self.engine) {
            assert!(started.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn end(self) {
        self.signal();
        self.signal();
        self.thread.join().unwrap().unwrap();
    }
}

fn read(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn status(reply: &str) -> &str {
    reply.split(' ').nth(1).unwrap_or_default()
}

fn small_queue(queue: usize) -> Settings {
    Settings { queue, ..settings() }
}

#[test]
fn beyond_the_queue_is_429_and_those_within_are_answered() {
    let gate = Gate::default();
    let live = start(service_with(Scripted::says("done").behind(&gate), None, small_queue(2)));
    let running = live.chat(json!({}));
    live.until("one runs", |engine| engine.running() == 1);
    let waiting = [live.chat(json!({})), live.chat(json!({"stream": true}))];
    live.until("two wait", |engine| engine.waiting() == 2);
    for path in ["/v1/chat/completions", "/query"] {
        let body = json!({"query": "q", "messages": [{"role": "user", "content": "Hi"}]});
        let refused = read(live.send(path, &body));
        assert_eq!(status(&refused), "429", "{refused}");
        assert!(refused.contains("retry-after: 1\r\n"), "{refused}");
        assert!(refused.contains("the queue is full: 2 requests are waiting"), "{refused}");
    }
    gate.open();
    for reply in [running].into_iter().chain(waiting).map(read) {
        assert_eq!(status(&reply), "200", "{reply}");
    }
    live.end();
}

#[test]
fn sixty_four_clients_get_an_answer_or_429() {
    let live =
        start(service_with(Scripted::says("fine").slow(Duration::from_millis(1)), None, small_queue(8)));
    let replies: Vec<String> = thread::scope(|scope| {
        let clients: Vec<_> = (0..64)
            .map(|at| {
                scope.spawn({
                    let live = &live;
                    move || read(live.chat(json!({"stream": at % 2 == 0})))
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let count = |code: &str| replies.iter().filter(|reply| status(reply) == code).count();
    assert_eq!(count("200") + count("429"), 64);
    assert!(count("200") >= 9, "{} of 64", count("200"));
    let whole =
        |reply: &&String| status(reply) == "200" && (reply.contains("[DONE]") || reply.contains("\"fine\""));
    assert_eq!(replies.iter().filter(whole).count(), count("200"));
    assert_eq!((live.engine.running(), live.engine.waiting()), (0, 0));
    live.end();
}

#[test]
fn a_client_that_goes_away_cancels_its_answer() {
    let endless = Scripted::new(Say::Forever).slow(Duration::from_millis(20));
    let live = start(service_with(endless, None, small_queue(4)));
    for stream in [true, false] {
        // 1,900 tokens of 20 ms would be 38 s.
        let client = live.chat(json!({"stream": stream, "max_tokens": 1900}));
        live.until("it runs", |engine| engine.running() == 1);
        drop(client);
        let left = Instant::now();
        live.until("it is let go", |engine| engine.running() == 0);
        assert!(left.elapsed() < Duration::from_secs(5), "{:?}", left.elapsed());
    }
    live.end();
}

#[test]
fn a_client_that_goes_away_leaves_the_queue() {
    let gate = Gate::default();
    let live = start(service_with(Scripted::says("ok").behind(&gate), None, small_queue(1)));
    let running = live.chat(json!({}));
    live.until("one runs", |engine| engine.running() == 1);
    let waiting = live.chat(json!({}));
    live.until("one waits", |engine| engine.waiting() == 1);
    drop(waiting);
    gate.open();
    assert_eq!(status(&read(running)), "200");
    live.until("the queue is empty", |engine| engine.waiting() == 0 && engine.running() == 0);
    live.end();
}

#[test]
fn clients_that_went_away_do_not_fill_the_queue() {
    let gate = Gate::default();
    let live = start(service_with(Scripted::says("ok").behind(&gate), None, small_queue(2)));
    let running = live.chat(json!({}));
    live.until("one runs", |engine| engine.running() == 1);
    let waiting = [live.chat(json!({})), live.chat(json!({"stream": true}))];
    live.until("two wait", |engine| engine.waiting() == 2);
    drop(waiting);
    live.until("nobody waits", |engine| engine.waiting() == 0);
    let metrics = live.get("/metrics");
    assert!(metrics.contains("\ngranite_requests_waiting 0\n"), "{metrics}");
    assert!(live.get("/health").contains("\"waiting\":0"));
    let later = live.chat(json!({}));
    live.until("one waits", |engine| engine.waiting() == 1);
    gate.open();
    for reply in [running, later].map(read) {
        assert_eq!(status(&reply), "200", "{reply}");
    }
    live.end();
}

#[test]
fn the_first_signal_lets_answers_finish_and_takes_no_more() {
    let gate = Gate::default();
    let live = start(service_with(Scripted::says("to the end").behind(&gate), None, small_queue(4)));
    let running = live.chat(json!({"stream": true}));
    live.until("one runs", |engine| engine.running() == 1);
    live.signal();
    let refused = Instant::now();
    while TcpStream::connect(live.address).is_ok() {
        assert!(refused.elapsed() < Duration::from_secs(20), "it still listens");
        thread::sleep(Duration::from_millis(2));
    }
    assert!(!live.thread.is_finished());
    gate.open();
    let reply = read(running);
    assert!(reply.contains("[DONE]"), "{reply}");
    live.thread.join().unwrap().unwrap();
}

#[test]
fn the_second_signal_ends_at_once() {
    let endless = Scripted::new(Say::Forever).slow(Duration::from_millis(20));
    let live = start(service_with(endless, None, small_queue(4)));
    let running = live.chat(json!({"stream": true, "max_tokens": 1900}));
    live.until("one runs", |engine| engine.running() == 1);
    let signalled = Instant::now();
    live.signal();
    live.signal();
    live.thread.join().unwrap().unwrap();
    assert!(signalled.elapsed() < Duration::from_secs(5), "{:?}", signalled.elapsed());
    drop(running);
}

#[test]
fn half_a_request_does_not_hold_the_end() {
    let gate = Gate::default();
    let live = start(service_with(Scripted::says("to the end").behind(&gate), None, small_queue(4)));
    let head = "POST /query HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{";
    let halves = ["GET /hea", head].map(|half| {
        let mut stream = live.connect();
        stream.write_all(half.as_bytes()).unwrap();
        stream
    });
    let running = live.chat(json!({}));
    live.until("one runs", |engine| engine.running() == 1);
    live.signal();
    // Longer than such connections are waited for: an open request is.
    thread::sleep(Duration::from_millis(1500));
    assert!(!live.thread.is_finished());
    gate.open();
    let opened = Instant::now();
    assert_eq!(status(&read(running)), "200");
    live.thread.join().unwrap().unwrap();
    assert!(opened.elapsed() < Duration::from_secs(10), "{:?}", opened.elapsed());
    drop(halves);
}
